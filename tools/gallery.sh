#!/bin/sh
# Draws the README's gallery anew with the bundled model (docs/*.png, all but tuned.png), and prints what `metrics` says of it.
# Wants the examples built for release: `make gallery`. Some ten minutes on two cores.
#
#   tools/gallery.sh [EXAMPLES]      default: target/release/examples
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
examples=${1:-$root/target/release/examples}
pictures=$root/assets/pictures
harvest=$pictures/style_harvest.png
gravel=$pictures/texture_gravel.png
astronaut=$pictures/content_astronaut.png
out=$root/out/gallery
mkdir -p "$out"
LD_LIBRARY_PATH=$root/.libtorch/torch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export LD_LIBRARY_PATH OMP_WAIT_POLICY

# A picture, and beside its inputs what the README shows: draw NAME EXAMPLE FLAGS.
draw() {
    name=$1 example=$2
    shift 2
    "$examples/$example" "$@" --output "$out/$name.png" --sheet "$out/$name-sheet.png" >/dev/null 2>"$out/$name.log" || { cat "$out/$name.log" >&2; exit 1; }
    # After Ctrl-C an example writes what there is.
    if grep -q 'stopped after step' "$out/$name.log"; then exit 130; fi
    mv "$out/$name-sheet.png" "$root/docs/$name.png"
}

# judge NAME FLAGS
judge() {
    name=$1
    shift
    echo "$name: $("$examples/metrics" --result "$out/$name.png" --fit-styles "$@" | grep -v -e _scale_ -e psnr | tr '\n' ' ')"
}

draw style_transfer style_transfer --content "$astronaut" --style "$harvest" --size 256x256
judge style_transfer --style "$harvest" --content "$astronaut"

draw text_to_image text_to_image --style "$harvest"
judge text_to_image --style "$harvest"

draw sampling style_transfer --method sample --content "$astronaut" --style "$harvest" --size 256x256 --content-weight 0.35
judge sampling --style "$harvest" --content "$astronaut"

draw colours style_transfer --colours content --content "$pictures/content_chelsea.png" --style "$harvest" --size 256x256
judge colours --style "$harvest" --content "$pictures/content_chelsea.png"

draw controlled texture_synthesis --style "$harvest" --style-mask "$pictures/labels_harvest.png" --target-mask "$pictures/labels_hill.png"
judge controlled --style "$harvest"
judge controlled --style "$harvest" --style-mask "$pictures/labels_harvest.png" --target-mask "$pictures/labels_hill.png"

draw edited edit_texture --layout "$pictures/layout_harvest.png" --style "$harvest" --content-weight 0.15 --strength 0.7
judge edited --style "$harvest" --content "$pictures/layout_harvest.png"

draw optimised texture_synthesis --style "$gravel" --size 256x256
judge optimised --style "$gravel"

draw seamless texture_synthesis --style "$gravel" --method sample --tile both --size 256x256
judge seamless --style "$gravel"

draw expansion texture_expansion --style "$gravel" --size 768x256 --stride 32 --view-batch 2
# The README shows it alone.
cp "$out/expansion.png" "$root/docs/expansion.png"
judge expansion --style "$gravel"
