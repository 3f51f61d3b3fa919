"""Drafts that feed their states back, like EAGLE: a step of a chain reads the feature that the previous one computed.

``alignment`` has the index equation, ``ttt_attention`` the attention of EAGLE-3's training-time test (and of HASS's
harmonised context), ``unrolling`` runs its steps, and ``drafter`` drafts.
"""
