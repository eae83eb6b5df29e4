-- The variables are set by bench/compare for each workload (bench/lib/workloads.py).
SELECT lock_generator_run(:hold_ns, :out_ns, :min_ms, :shared_pct,
                          :sleep_every, :sleep_us, :compute_every, :compute_us);
