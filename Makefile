# make demo       install into .venv, then rotate real inputs with the shipped weights; writes demo/
#                 (make demo CT=ct.nii.gz RADIOGRAPH=hip.dcm to add your own)
# make test       install the dev extra, run every notebook and every test
# make quick      while you edit: the house rules, the fast tests, and the notebooks that you changed
# make export     write radrotator/ from the notebooks
# make notebooks  execute the notebooks and store what they print and draw
# make docs       write the documentation site to _docs/, without Quarto; with npm also the page that rotates in the browser
# make readme     write README.md and MODEL_CARD.md from their notebooks
# make clean      remove what was made, except .venv and runs/

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# The stamps are real files: a second make finds nothing to install until the requirements change.
INSTALLED := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

# Notebooks and tests run side by side; more threads than cores would only make them wait for each other.
test quick notebooks: export OMP_NUM_THREADS ?= 1

.PHONY: demo test quick export notebooks docs readme clean

demo: $(INSTALLED)
	$(VENV)/bin/radrotator demo -o demo $(if $(CT),--ct "$(CT)") $(if $(RADIOGRAPH),--radiograph "$(RADIOGRAPH)")

test: $(DEV)
	$(PY) -m pytest tests -n 2 --dist worksteal -ra

quick: $(DEV)
	$(PY) -m pytest tests --quick -n 2 --dist worksteal -q

export: $(DEV)
	$(VENV)/bin/nbdev_export

# The export comes after, because cleaning may give a new cell the id that the module quotes.
notebooks: $(DEV)
	$(PY) .ci/execute.py
	$(VENV)/bin/nbdev_export

docs: $(DEV)
	$(PY) .ci/docs.py

readme: $(DEV)
	$(PY) .ci/readme.py

clean:
	rm -rf web/node_modules demo build dist *.egg-info .pytest_cache _proc _docs nbs/nbdev.yml
	find radrotator tests nbs .ci -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): setup.py settings.ini
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit("RadRotator needs Python 3.11 or newer and %s is %d.%d: name another, as in make PYTHON=python3.12" % ((sys.executable,) + v) if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --upgrade pip
	$(PY) -m pip install --editable .
	@touch $@

$(DEV): $(INSTALLED)
	$(PY) -m pip install --editable ".[dev]"
	$(PY) -m pip install --no-deps mediffusion==0.7.1   # an oracle of the tests; what it depends on (Lightning, MONAI, wandb) they do not need
	@touch $@
