# make demo | run | test | lint | clean. Everything installs itself into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# what `make run` trains on and how, for example: make run ARGS="--dataset folder --data-dir data/cifar10-jpg"
ARGS ?=
RESULTS ?= results
DEMO := --dataset digits --results-dir results/demo --epochs 10 --batch-size 32 --lr 0.02 --umap-points 300

.PHONY: demo run test lint clean

demo: $(VENV)/installed
	$(BIN)/python part1_baseline.py $(DEMO)
	$(BIN)/python part2_robustness.py --checkpoint results/demo/part1.pt --results-dir results/demo --umap-points 300
	$(BIN)/python part3_augmented.py $(DEMO)
	$(BIN)/python part4_angular.py $(DEMO) --epochs 20

run: $(VENV)/installed
	$(BIN)/python part1_baseline.py --results-dir $(RESULTS) $(ARGS)
	$(BIN)/python part2_robustness.py --checkpoint $(RESULTS)/part1.pt --results-dir $(RESULTS)
	$(BIN)/python part3_augmented.py --results-dir $(RESULTS) $(ARGS)
	$(BIN)/python part4_angular.py --results-dir $(RESULTS) $(ARGS)
	$(BIN)/python part4_angular.py --augment --results-dir $(RESULTS) $(ARGS)

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .

$(VENV)/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) results/demo
