# The front desk. `make demo` shows the main job on this machine, `make test` proves the tree; both install what is
# missing first (tests/lab/setup.sh) and say so.

CARGO ?= cargo
PROFILE = --release
BINS = -p vmseal-cli -p vmseal-server -p vmseal-agent -p vmseal-disk -p vmseal-rbd -p vmseal-nbd-tls -p vmseal-ublk
OUT = $(or $(CARGO_TARGET_DIR),target)/release
export CARGO_TERM_COLOR ?= auto
# Each is a file below tests/e2e/tests.
SOAKS = boot create elsewhere outages hooks kills memory encrypt growth tamper class ublk

.PHONY: help demo demo-down test test-vectors test-rbd soak-rbd bench-start bench-disk bench-xts soak-fio soak-guest-fio soak-xts soak-handover lint build failpoints setup rust nextest
# cargo does the work in parallel.
.NOTPARALLEL:

help:
	@echo 'make demo          encrypt, boot and recover a disk on this machine; leaves it running'
	@echo 'make demo-down     stop what the demo left'
	@echo 'make test          build, then every proof in its small count (15 minutes on 2 cores)'
	@echo 'make test-vectors  only the published test vectors'
	@echo 'make test-rbd      volumes on Ceph RBD, with a cluster on this machine (installs Ceph; 6 minutes)'
	@echo 'make soak-NAME     one proof in its full count: $(SOAKS) fio guest-fio xts rbd store handover'
	@echo 'make fuzz-NAME     ten minutes (FUZZ_SECONDS) of a target below fuzz/fuzz_targets; fuzz-keep-NAME keeps what it found'
	@echo 'make bench-start   what encryption adds to virsh start; writes bench/out/start.json'
	@echo 'make bench-xts     our cipher beside aws-lc, memcpy and the processor at its best; writes bench/out/xts.json'
	@echo 'make bench-disk    our disks beside QEMU and nbdkit (8 minutes); writes bench/out/disk.json; ARGS="--only TEXT"'
	@echo 'make lint          what CI demands of the source: format, lints, doors, bans'
	@echo 'make build         the programs, below target/release'

demo: build
	@$(CARGO) run --quiet $(PROFILE) -p vmseal-e2e --bin demo -- up

demo-down: rust
	@$(CARGO) run --quiet $(PROFILE) -p vmseal-e2e --bin demo -- down

build: setup rust
	$(CARGO) build $(PROFILE) --locked $(BINS)
	$(CARGO) build $(PROFILE) --locked -p vmseal-e2e --bins

# First the rooms, each against real peers; then whole houses with real guests, one at a time (.config/nextest.toml).
test: failpoints build nextest lint
	$(CARGO) build $(PROFILE) --locked --workspace --all-targets
	$(CARGO) nextest run $(PROFILE) --locked --workspace

test-vectors: rust nextest
	@tests/lab/setup.sh build
	$(CARGO) nextest run $(PROFILE) --locked -p vmseal-keys -p vmseal-xts -p vmseal-luks --success-output final \
	  -E 'binary(/^vectors/)'

# In `make test` these run only where Ceph's programs are installed already.
test-rbd soak-rbd: rust nextest
	@tests/lab/setup.sh ceph
	$(CARGO) build $(PROFILE) --locked $(BINS)
	VMSEAL_NEED_CEPH=1 $(if $(filter soak-%,$@),VMSEAL_SOAK=1) $(CARGO) nextest run $(PROFILE) --locked -p vmseal-disk \
	  -p vmseal-agent -p vmseal-e2e --profile $(if $(filter soak-%,$@),soak,default) --success-output final \
	  -E '(binary(=disk) and test(/^remote/)) or test(/^tasks::tests::rbd::/) or binary(=rbd)'

$(SOAKS:%=soak-%): soak-%: failpoints build nextest
	@echo 'make: $* in its full count; it says at its end how often it did what'
	$(CARGO) build $(PROFILE) --locked -p vmseal-e2e --test $*
	VMSEAL_SOAK=1 $(CARGO) nextest run $(PROFILE) --locked -p vmseal-e2e --profile soak --success-output final -E 'binary(=$*)'

bench-start: build
	@$(CARGO) run --quiet $(PROFILE) -p vmseal-e2e --bin bench_start

bench-xts: rust
	@$(CARGO) run --quiet $(PROFILE) --locked -p vmseal-bench-xts

# Proofs that live in their rooms.
soak-fio: setup rust nextest
	$(CARGO) build $(PROFILE) --locked -p vmseal-disk
	VMSEAL_SOAK=1 $(CARGO) nextest run $(PROFILE) --locked -p vmseal-disk --profile soak --success-output final -E 'test(/^fio::/)'
soak-guest-fio: setup rust nextest
	$(CARGO) build $(PROFILE) --locked -p vmseal-disk
	VMSEAL_SOAK=1 $(CARGO) nextest run $(PROFILE) --locked -p vmseal-disk --profile soak --success-output final -E 'test(/^guest_fio::/)'
soak-handover: setup rust nextest
	$(CARGO) build $(PROFILE) --locked -p vmseal-disk
	VMSEAL_SOAK=1 $(CARGO) nextest run $(PROFILE) --locked -p vmseal-disk --profile soak --success-output final -E 'test(survive_hand_overs)'
soak-xts: rust nextest
	VMSEAL_SOAK=1 $(CARGO) nextest run $(PROFILE) --locked -p vmseal-xts --profile soak --success-output final -E 'test(differential)'

bench-disk: setup rust
	$(CARGO) build $(PROFILE) --locked -p vmseal-disk
	$(CARGO) build $(PROFILE) --locked -p vmseal-bench-disk
	@$(OUT)/bench-disk $(ARGS)

lint: rust
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(PROFILE) --locked --workspace --all-targets -- -D warnings
	$(CARGO) xtask check-doors

# An agent that ends where a test tells it to, as by kill -9. `build` comes after it and puts the real one back.
failpoints: setup rust
	$(CARGO) build $(PROFILE) --locked $(BINS) --features vmseal-agent/failpoints
	@cp -f $(OUT)/vmseal-agent $(OUT)/vmseal-agent-failpoints

setup:
	@tests/lab/setup.sh

rust:
	@command -v $(CARGO) >/dev/null || { \
	  echo 'make: cargo is missing. Rust 1.94 or later is needed: install rustup from your distribution or rustup.rs,' >&2; \
	  echo '      then run `rustup toolchain install stable`.' >&2; exit 1; }
	@v=$$(rustc --version | cut -d' ' -f2); \
	  [ "$$(printf '%s\n1.94.0\n' "$$v" | sort -V | head -1)" = 1.94.0 ] || { \
	  echo "make: this is Rust $$v, 1.94 or later is needed: run \`rustup update stable\`." >&2; exit 1; }

nextest: rust
	@$(CARGO) nextest --version >/dev/null 2>&1 || { \
	  echo 'make: installing cargo-nextest, the test runner, with cargo'; $(CARGO) install --locked cargo-nextest; }

# Media that fail and crashes, in full counts (docs/design/testing.md).
.PHONY: soak-store
soak-store: build nextest
	@echo 'make: disks on a store that fails, and every crash; it says at its end how often it did what'
	VMSEAL_SOAK=1 $(CARGO) nextest run $(PROFILE) --locked -p vmseal-test-store --profile soak --success-output final

# As cargo-fuzz sets them, but for what needs an unstable compiler. --target: so that build scripts are left alone.
FUZZ_FLAGS = -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
  -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions -Ccodegen-units=1 --cfg fuzzing
FUZZ_HOST = $(shell rustc -vV | sed -n 's/^host: //p')
FUZZ_OUT = $(or $(CARGO_TARGET_DIR),target)/fuzz
FUZZ_LIMITS = -max_len=9000 -timeout=10 -rss_limit_mb=2048
# What a device says of each bad message would be most of the output.
fuzz-vhost_user_messages: FUZZ_LIMITS += -close_fd_mask=2

fuzz-keep-%: fuzz-build-%
	@mkdir -p $(FUZZ_OUT)/found/$* fuzz/corpus/$*
	$(FUZZ_OUT)/$(FUZZ_HOST)/release/$* -merge=1 $(FUZZ_LIMITS) fuzz/corpus/$* $(FUZZ_OUT)/found/$*

fuzz-build-%: setup rust
	RUSTFLAGS="$(FUZZ_FLAGS)" $(CARGO) build --release --locked -p vmseal-fuzz --features libfuzzer --bin $* \
	  --target $(FUZZ_HOST) --target-dir $(FUZZ_OUT)

fuzz-%: fuzz-build-%
	@mkdir -p $(FUZZ_OUT)/found/$* $(FUZZ_OUT)/crashes
	$(FUZZ_OUT)/$(FUZZ_HOST)/release/$* -max_total_time=$(or $(FUZZ_SECONDS),600) $(FUZZ_LIMITS) \
	  -artifact_prefix=$(FUZZ_OUT)/crashes/$*- $(FUZZ_OUT)/found/$* fuzz/corpus/$*
