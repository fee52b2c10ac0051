# Every target sets itself up: nothing has to be run before it.
#
#   make drill    a real kernel dies twice on a virtual twin, and both dumps are proved byte for byte
#   make test     all checks and tests, the drills included
#   make check    the quick part of it: lint, types, unit tests
#   make bench    a drill against the two boots it contains
#   make bench-purgatory  the purgatory alone, on thousands of generated plans (a minute or two)
#   make bench-capture  capture beside makedumpfile, on a real vmcore (a good half hour)
#   make reach    every kernel of Debian's on every machine, and the README's table (an hour or so on two cores)
#   make kill-campaign  forty drills whose workers and driver are killed meanwhile (a quarter of an hour)
#   make big-endian  a big-endian kernel for drills, built from source (docs/big-endian.md)
#   make wheel    the distributable package, in dist/
#   make purgatory  assemble the purgatory after a change of purgatory.S

VENV := .venv
BIN := $(VENV)/bin
PURGATORY := src/crashkernel/purgatory/purgatory
PARALLEL := -n auto --dist loadgroup

# What is asked of Debian if it is missing: how to tell that it is there, and the package that has it.
define wanted
	@$(1) || { \
	  echo "installing $(2)"; \
	  as_root=$$([ $$(id -u) = 0 ] || echo sudo); \
	  $$as_root apt-get update -q >/dev/null && \
	  DEBIAN_FRONTEND=noninteractive $$as_root apt-get install -q -y --no-install-recommends $(2) >/dev/null || \
	  { echo "cannot install $(2): install it by hand, then run make again" >&2; exit 3; }; }
endef
need = $(call wanted,command -v $(1) >/dev/null,$(2))
need_library = $(call wanted,/sbin/ldconfig -p | grep -qF '$(1)',$(2))

.PHONY: setup qemu binutils codecs readers browser drill test check bench bench-purgatory bench-capture reach kill-campaign big-endian wheel purgatory clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed" >&2; exit 3; }
	@python3 -c 'import ensurepip' 2>/dev/null || { as_root=$$([ $$(id -u) = 0 ] || echo sudo); \
	  $$as_root apt-get update -q >/dev/null; $$as_root apt-get install -q -y --no-install-recommends python3-venv >/dev/null; }
	@echo "preparing $(VENV)"
	@[ -x $(BIN)/python ] || python3 -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

qemu:
	$(call need,qemu-system-ppc64,qemu-system-ppc)
	$(call need,zstd,zstd)

binutils:
	$(call need,powerpc64le-linux-gnu-as,binutils-powerpc64le-linux-gnu)
	$(call need,cpio,cpio)
	$(call need,readelf,binutils)

# What compresses, encrypts, receives and reads dumps (docs/dependencies.md).
codecs:
	$(call need_library,liblzo2.so.2,liblzo2-2)
	$(call need_library,libdeflate.so.0,libdeflate0)
	$(call need_library,libsnappy.so.1,libsnappy1v5)
	$(call need,age,age)

# What opens our dumps, or takes them, in the tests.
readers: codecs
	$(call need,qemu-ppc64le-static,qemu-user-static)
	$(call need,qemu-system-x86_64,qemu-system-x86)
	$(call wanted,/usr/bin/python3 -c 'import kdumpfile' 2>/dev/null,python3-libkdumpfile)
	$(call wanted,[ -x /usr/sbin/sshd ],openssh-server)
	$(call need,ssh,openssh-client)
	$(call need,openssl,openssl)
	$(call wanted,PATH=$$PATH:/sbin:/usr/sbin command -v mke2fs >/dev/null,e2fsprogs)

# What opens reports in the tests.
browser:
	$(call wanted,{ command -v chromium && command -v chromedriver && command -v pdftotext; } >/dev/null,chromium chromium-driver poppler-utils)

drill: setup qemu
	$(BIN)/crashkernel drill

check: setup binutils codecs
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy
	$(BIN)/pytest $(PARALLEL) tests/unit

test: check qemu readers browser
	$(BIN)/pytest $(PARALLEL) tests/bench tests/drill tests/capture tests/campaign tests/report

bench: setup qemu
	$(BIN)/crashkernel bench drill

bench-purgatory: setup qemu
	$(BIN)/crashkernel bench purgatory

bench-capture: setup readers
	$(BIN)/crashkernel bench capture

reach: setup qemu codecs
	$(BIN)/crashkernel campaign run campaigns/reach.toml --junit reach.xml; status=$$?; \
	  $(BIN)/crashkernel campaign table reach.sqlite --update README.md && exit $$status

kill-campaign: setup qemu
	$(BIN)/python tests/campaign/killed.py

big-endian: setup
	$(call need,powerpc64-linux-gnu-gcc,gcc-powerpc64-linux-gnu libc6-dev-ppc64-cross)
	$(call need,gcc,gcc libc6-dev)
	$(call need,flex,flex)
	$(call need,bison,bison)
	$(call need,bc,bc)
	$(call need,xz,xz-utils)
	$(call need,bzip2,bzip2)
	$(BIN)/crashkernel big-endian

wheel: setup
	$(BIN)/python -m build --wheel --outdir dist .

purgatory: binutils
	powerpc64le-linux-gnu-as -mbig -a64 -o $(PURGATORY).o $(PURGATORY).S
	powerpc64le-linux-gnu-objcopy -O binary $(PURGATORY).o $(PURGATORY).bin
	@rm $(PURGATORY).o

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
