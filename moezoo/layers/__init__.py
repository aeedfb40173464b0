"""The layers that architectures are put together from.

What may stand in a decoder layer's attention place is a `moezoo.layers.mixer.SequenceMixer`, which
declares what decoders and caches ask of it. Any module may also have these attributes, by which it
tells loaders what its parameters alone do not say:

    keep_dtype      names of its parameters that keep their own dtype, whatever the model's is, as a
                    router's fp32 correction bias does (`BiasedRoute`)
    keep_dense      names of its linear layers whose weight it uses as matrices: they are
                    dequantised where a checkpoint has them quantised (`MultiHeadLatentAttention`)
    part_sizes      rows of each of the checkpoint's tensors that are stacked in its weight and
                    bias, all the same where it has no such attribute (`FusedLinear`)
    initial_values  name -> number: what its parameters are filled with when random weights are
                    made (`GatedDeltaNet`). Other biases are 0, weights of norms 1, and all else
                    is normally distributed

A shared expert may have an attribute `adds`, see `moezoo.layers.moe.FusedMoE`.
"""
