# make run     boot a Linux PV guest and show the interrupts on both sides
# make test    everything that is checked: style, types, import floors, tests
# make fuzz    the property tests with fresh random examples instead of the fixed ones of make test
# make conformance   event channels against real Xen in QEMU, with fresh seeds (docs/conformance.md)
# make bench   the benchmarks: medians, and bench.json
# make bench-xen     the devices' benchmarks on pvirq and on real Xen in QEMU, side by side (docs/benchmarks.md)
# make crossing    the guests' machine code, where crossing.c has changed (src/pvirq/engine)
# make compiled    the checker's search as machine code (mypyc, gcc): optional, about twice as fast
# make clean   take away what the others made here (the cache of kernels stays)

BIN := .venv/bin

.PHONY: run test lint fuzz conformance bench bench-xen crossing compiled setup clean

run: setup
	$(BIN)/pvirq boot --exec 'cat /proc/interrupts' --dom0-interrupts

test: setup lint
	$(BIN)/python -m pytest -n auto --dist loadfile

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
	-tools/compiled.sh $(BIN)/mypyc src
	$(BIN)/python -m benchmarks

bench-xen: setup
	$(BIN)/python -m benchmarks.xen.run

crossing:
	tools/crossing.sh

compiled: setup
	tools/compiled.sh $(BIN)/mypyc src

setup:
	@tools/setup.sh

clean:
	rm -f src/pvirq/check/*.so
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis bench.json bench-xen.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
