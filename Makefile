# make run     boot a Linux PV guest and show the interrupts on both sides
# make test    everything that is checked: style, types, import floors, tests
# make fuzz    the property tests with fresh random examples instead of the fixed ones of make test
# make conformance   event channels against real Xen in QEMU, with fresh seeds (docs/conformance.md)
# make bench   the benchmarks: medians, and bench.json
# make bench-xen     the devices' benchmarks on pvirq and on real Xen in QEMU, side by side (docs/benchmarks.md)
# make crossing    the guests' machine code, where crossing.c has changed (src/pvirq/engine)
# make compiled    pvirq's hottest modules as machine code (mypyc, gcc; some minutes): optional (docs/machine-code.md)
# make clean   take away what the others made here (the cache of kernels stays)

BIN := .venv/bin

.PHONY: run test lint fuzz conformance bench bench-xen crossing compiled setup clean

run: setup
	$(BIN)/pvirq boot --exec 'cat /proc/interrupts' --dom0-interrupts

test: setup lint
	PVIRQ_COMPILED=0 $(BIN)/python -m pytest -n auto --dist loadfile

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fuzz: setup
	$(BIN)/python -m pytest --hypothesis-profile=fuzz -m "not boot" $$(grep -l hypothesis tests/test_*.py)

conformance: setup
	$(BIN)/python tests/conformance.py $(CONFORMANCE)

bench: setup
	-$(BIN)/python tools/compiled.py
	$(BIN)/python -m benchmarks

bench-xen: setup
	$(BIN)/python -m benchmarks.xen.run

crossing:
	tools/crossing.sh

compiled: setup
	$(BIN)/python tools/compiled.py

setup:
	@tools/setup.sh

clean:
	find src -name '*.so' -delete
	rm -f src/pvirq/compiled.txt
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis bench.json bench-xen.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
