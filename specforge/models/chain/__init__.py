"""Drafts that feed themselves back, as EAGLE's do: a step of a chain reads the feature that the one before computed.

``alignment`` has the index equation, ``ttt_attention`` the attention of EAGLE-3's training-time test (of HASS's
harmonised context too), ``unrolling`` runs its steps, and ``drafter`` drafts.
"""
