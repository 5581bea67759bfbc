# make demo | run | study | reference | test | test-all | lint | clean. Everything installs itself
# into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# what `make run` and `make study` train on and how, for example:
#   make run ARGS="--dataset folder --data-dir data/cifar10-jpg"
ARGS ?=
# of these, to part 2, which has the data from the checkpoint
PASSED_ON = $(filter --no-umap --compile --resume --device=% --umap-points=%,$(subst --device ,--device=,\
	$(subst --umap-points ,--umap-points=,$(strip $(ARGS)))))
RESULTS ?= results
DEMO := --dataset digits --results-dir results/demo --epochs 6 --batch-size 32 --lr 0.05 \
	--umap-points 100
DEMO_TEST := part2_robustness.py --results-dir results/demo --umap-points 100 \
	--attack-images 100 --audit-images 20 --eps-255 0 32 64 128 --checkpoint

.PHONY: demo run study same-arguments reference test test-all lint clean
.PHONY: demo-train1 demo-train3 demo-train4 demo-test1 demo-test3 demo-test4

# two at once, on half the cores each: much of such short runs is imports and compilation, on one core
demo: $(VENV)/installed
	@echo "results/demo: two parts at once; what each prints follows when it ends"
	@$(MAKE) --no-print-directory -j2 demo-test1 demo-test3 demo-test4

demo-train1:
	$(call printed,part1_baseline.py $(DEMO))

demo-train3:
	$(call printed,part3_augmented.py $(DEMO) --no-part2)

demo-train4:
	$(call printed,part4_angular.py $(DEMO) --no-part2)

# part 2 tries part 1's adversarial images on every other model
demo-test1 demo-test3 demo-test4: demo-test%: demo-train% demo-train1
	$(call printed,$(DEMO_TEST) results/demo/part$*.pt)

define printed
@echo "started: python $(1)"
@output=$$(OMP_NUM_THREADS=$(HALF) $(BIN)/python $(1) 2>&1); status=$$?; \
	printf '\nended: python %s\n%s\n' "$(1)" "$$output"; exit $$status
endef
HALF := $(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 )))

run: $(VENV)/installed
	$(BIN)/python part1_baseline.py --results-dir $(RESULTS) $(ARGS)
	$(BIN)/python part2_robustness.py --checkpoint $(RESULTS)/part1.pt --results-dir $(RESULTS) \
		$(PASSED_ON)
	$(BIN)/python part3_augmented.py --results-dir $(RESULTS) $(ARGS)
	$(BIN)/python part4_angular.py --results-dir $(RESULTS) $(ARGS)
	$(BIN)/python part4_angular.py --augment --results-dir $(RESULTS) $(ARGS)

# ---- the study: every seed has a split and a directory of its own ------------------------------
# make -j2 study         two at once, trainings or tests; stopped, the same command goes on
# make study SEEDS=2     one seed, such as one job of a cluster
SEEDS ?= 1 2 3
THREADS ?= 1# of each training; sums in another order are other results, so resume with the same
STUDY := $(RESULTS)/study
REFERENCE ?= results/reference
STUDIED := part1 part3 part3_crop_flip part4 part4_augmented part4_proxies
TESTS ?= --severities 1 2 3 4 5
ifneq ($(words $(RESULTS)),1)
$(error RESULTS="$(RESULTS)": give one folder, without a space in its name)
endif
ifeq ($(words $(SEEDS)),0)
$(error SEEDS is empty: give numbers, such as SEEDS="1 2 3")
endif
SEED_DIRS := $(SEEDS:%=$(STUDY)/seed%)
MODELS := $(foreach part,$(STUDIED),$(SEED_DIRS:%=%/$(part)))

# else make removes what nobody asked for by name, such as part 1's stamp with STUDIED=part3
.PRECIOUS: $(foreach part,part1 $(STUDIED),$(STUDY)/seed%/$(part).trained)

study: $(MODELS:=.tested) $(MODELS:=.trained)
	$(if $(word 2,$(SEEDS)),$(BIN)/python summary.py $(SEED_DIRS))

$(STUDY)/seed%/part1.trained: | $(VENV)/installed same-arguments
	$(call train,part1_baseline.py)

$(STUDY)/seed%/part3.trained: | $(VENV)/installed same-arguments
	$(call train,part3_augmented.py --no-part2)

$(STUDY)/seed%/part3_crop_flip.trained: | $(VENV)/installed same-arguments
	$(call train,part3_augmented.py --families none --no-part2)

$(STUDY)/seed%/part4.trained: | $(VENV)/installed same-arguments
	$(call train,part4_angular.py --no-part2)

$(STUDY)/seed%/part4_augmented.trained: | $(VENV)/installed same-arguments
	$(call train,part4_angular.py --augment --no-part2)

$(STUDY)/seed%/part4_proxies.trained: | $(VENV)/installed same-arguments
	$(call train,part4_angular.py --proxies --no-part2)

# a stamp holds the ARGS or TESTS it was made with: results of others do not pass for the asked ones
export ARGS TESTS
same-arguments:
	$(call same,trained,ARGS)
	$(call same,tested,TESTS)
	@for stamp in $(wildcard $(STUDY)/seed*/*.trained); do \
		newer=$$(find *.py -newer $$stamp); test -z "$$newer" || { echo "$$stamp is older than" \
		$$newer", but is not made anew: if that changes results, give another directory with RESULTS="; \
		break; }; done

define same
@for stamp in $(wildcard $(STUDY)/seed*/*.$(1)); do \
	was=$$(cat $$stamp); test ! -s $$stamp || test "$$was" = "$$$(2)" || { echo "$$stamp was made \
	with $(2)=\"$$was\"; give the same, or another directory with RESULTS=" >&2; exit 1; }; done
endef

# part 2 tries part 1's adversarial images on every other model
.SECONDEXPANSION:
$(STUDY)/%.tested: $(STUDY)/%.trained $$(@D)/part1.trained
	$(call logged,part2_robustness.py --checkpoint $(@:.tested=.pt) --results-dir $(@D) --resume \
		$(TESTS) $(PASSED_ON),TESTS)

train = $(call logged,$(1) --results-dir $(@D) --seed $* --split-seed $* --resume $(ARGS),ARGS)

define logged
$(info $(@D): $(1) (progress: $(basename $@).log))
@mkdir -p $(@D)
@OMP_NUM_THREADS=$(THREADS) $(BIN)/python $(1) >> $(basename $@).log 2>&1 || { tail -n 5 $(basename $@).log; exit 1; }
@printf '%s\n' "$$$(2)" > $@
endef

# What is committed: tables, records, figures; no weights and no images of the data set. Each
# summary is made anew there, so that it shows nothing else.
KEPT := -name '*.csv' -o -name '*.json' -o -name '*_correct.npz' -o -name '*.png'

reference: study
	mkdir -p $(REFERENCE)
	(cd $(STUDY) && find $(SEEDS:%=seed%) \( $(KEPT) \) ! -name '.*' ! -name '*_examples.png' \
		! -name '*_adversarial.png' | tar cf - -T -) | tar xf - -C $(REFERENCE)
	for s in $(SEEDS); do $(BIN)/python -c "import summary; summary.compare('$(REFERENCE)/seed$$s')" || exit 1; done
	$(if $(word 2,$(SEEDS)),$(BIN)/python summary.py $(SEEDS:%=$(REFERENCE)/seed%))
	rm -f $(SEEDS:%=$(REFERENCE)/seed%/summary.html) $(REFERENCE)/trainings.html  # in Markdown there

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-all: $(VENV)/installed-dev  # heavy counts in full
	FULL=1 $(MAKE) test

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .

$(VENV)/installed: requirements.txt constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and \
		'This needs Python 3.10 or newer; give one, such as PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) results/demo
