"""Schedules in Gluon for NVIDIA Hopper (sm_90): kernel, configuration table, launch, and when they apply."""
