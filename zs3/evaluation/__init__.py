"""One pass over a dataset, its result file, and the commands that read result files. The scores: `zs3.scores`."""

from zs3.scores.confusion import ConfusionMatrix
from zs3.scores.means import GeneralizedScores, generalized_scores

__all__ = ["ConfusionMatrix", "GeneralizedScores", "generalized_scores"]
