"""Surgery: apply a plan as a mask or as a slice, and prove that the two are equal.

Main names: `apply.apply`, `mask.mask`, `mask.unmask`, `slice.slice_model`, `proof.slice_with_proof`.
"""
