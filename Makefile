# `make demo` and `make test` need a Rust toolchain, a C++ compiler and python3 with pip; everything else they fetch.
# Afterwards plain cargo works too, with no environment variable set: .cargo/config.toml says where libtorch is.

CARGO ?= cargo
PYTHON ?= python3
CONTENT ?= assets/pictures/content_astronaut.png
STYLE ?= assets/pictures/style_harvest.png
CASES ?= bundled-256
FEATURES ?=
# Where cargo puts the examples.
EXAMPLES = $(or $(CARGO_TARGET_DIR),target)/release/examples

# `doc-only` does without libtorch, so nothing that is linked can be built with it; `download-libtorch` adds no code.
FEATURE_SETS = "--no-default-features" "" "--features hub" "--features hub,cuda-graphs" "--no-default-features --features cuda-graphs" "--no-default-features --features fused-attention"

.DEFAULT_GOAL := help
.PHONY: help libtorch demo test lint doc bench gallery compare reference fixtures clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

libtorch: ## install libtorch into .libtorch, unless LIBTORCH names one of your own
	@PYTHON='$(PYTHON)' tools/libtorch.sh

demo: libtorch ## style transfer with the bundled model; CONTENT=FILE and STYLE=FILE choose other pictures
	@mkdir -p out
	@$(CARGO) run --release --example style_transfer -- --content '$(CONTENT)' --style '$(STYLE)' \
		--size 256x256 \
		--output out/style_transfer.png --sheet out/style_transfer_sheet.png

test: libtorch ## the whole test suite
	$(CARGO) test --features hub
	$(CARGO) test --no-default-features --test 'core_*' --test image --test metrics
	$(CARGO) test --features cuda-graphs --lib --test 'core_graphs*' --test gpu_graphs
	$(PYTHON) tools/bundled_model/test_licences.py
	$(PYTHON) tools/bundled_model/test_folder.py
	$(PYTHON) tools/bundled_model/test_pictures.py

lint: libtorch ## format and clippy, every feature set
	$(CARGO) fmt --check
	@for features in $(FEATURE_SETS); do \
		echo "$(CARGO) clippy --all-targets $$features -- -D warnings"; \
		$(CARGO) clippy --all-targets $$features -- -D warnings || exit 1; \
	done
	$(CARGO) clippy --lib --features hub,doc-only -- -D warnings

# Without default features the front page has links to what is not there.
doc: libtorch ## the documentation
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --no-deps
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --no-deps --features hub
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --no-deps --features hub,cuda-graphs

bench: libtorch ## the benchmarks
	$(CARGO) bench

gallery: libtorch ## the README's pictures, by the bundled model
	$(CARGO) build --release --examples
	tools/gallery.sh '$(EXAMPLES)'

compare: libtorch ## the crate beside plain Python, CASES='NAME ..' COMPARE='--FLAG ..' FEATURES=NAME; PYTHON as for reference
	$(CARGO) build --release --features '$(FEATURES)' --example style_transfer --example text_to_image --example texture_expansion
	$(PYTHON) tools/reference/compare.py $(CASES) --examples '$(EXAMPLES)' $(COMPARE)

reference: libtorch ## whether diffusers loads what is saved; PYTHON needs the packages of tools/reference/requirements.txt
	$(CARGO) build --release --example finetune_vae
	$(PYTHON) tools/reference/check_saved_vae.py '$(EXAMPLES)/finetune_vae'

fixtures: ## write tests/fixtures anew; PYTHON needs the packages of tools/reference/requirements.txt
	$(PYTHON) tests/fixtures/make_fixtures.py

clean: ## remove what was built and drawn; .libtorch stays
	$(CARGO) clean
	rm -rf out
