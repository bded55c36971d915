"""Every norm: read into one state, and started from it.

At this level is what norms share: the state and the start (`state`, `start`, `pool`), names
(`registry`, `spec`, `entry`), the bases of layers (`base`, `plain`, `measured`, `affine_norm`) and
the kernel that they run on (`moments`, `passes`). The norms themselves lie by what they change in
BatchNorm, as the survey sorts them: `statistics`, `standardization`, `affine`; each may build on
those before it.
"""
