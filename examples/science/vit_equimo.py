"""A vision transformer in Equinox (equimo), with adapters in attention and MLP.

pip install --no-deps -r examples/science/requirements-light.txt
python examples/science/vit_equimo.py

Expect: 8 weights adapted, and 9 with the patches; values within 2e-7 of the merged model, gradients 3e-7.
"""

import equinox as eqx
import jax
from equimo.models.vit import VisionTransformer
from science.check import adapted_is_merged


def main():
    model = VisionTransformer(
        img_size=16,
        in_channels=3,
        dim=32,
        patch_size=4,
        num_heads=[2],
        depths=[2],
        num_classes=5,
        key=jax.random.key(0),
    )
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    images = jax.random.normal(jax.random.key(1), (2, 3, 16, 16))

    def classify(arrays, images):
        return jax.vmap(lambda image: eqx.combine(arrays, static)(image, inference=True))(images)

    _, lora = adapted_is_merged(classify, arrays, images)
    assert len(lora) == 8 and not any("head" in path or "patch" in path for path in lora)
    everything = [*lora, "patch_embed/proj/weight"]  # the patches are a convolution, adapted when named
    _, lora = adapted_is_merged(classify, arrays, images, targets=everything)
    assert len(lora) == 9


if __name__ == "__main__":
    main()
