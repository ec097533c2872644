# make demo: train, evaluate and try a tiny model on the embedded benchmark (about 7 minutes on 2 cores).
#            DEMO="--stage1_steps 20 ..." passes flags to the demo.
# make test: lint, and the test suite offline.
# make hub_cards: copies *_zs3.py beside the released weights. Run it after each change of them; a test checks this.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test hub_cards clean

demo: $(VENV)/.installed
	$(BIN)/zs3 demo $(DEMO)

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

hub_cards:
	rm -f hub_cards/zs3-scenes/*.py
	cp *_zs3.py hub_cards/zs3-scenes/

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) *.egg-info
