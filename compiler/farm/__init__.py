"""Device farms: kernels are measured on devices that a tracker leases."""
