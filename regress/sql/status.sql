-- One row, with these columns.
SELECT attname, atttypid::regtype
FROM (SELECT unnest(proargnames) AS attname, unnest(proallargtypes) AS atttypid
      FROM pg_proc WHERE oid = 'adaptive_lwlock_status'::regproc) columns;
SELECT count(*) FROM adaptive_lwlock_status();

-- The module is at work: every function of the lock's interface is replaced.
SELECT active, reason, functions_replaced > 0 AS replaced, mode FROM adaptive_lwlock_status();
SELECT server_version = current_setting('server_version') AS this_server FROM adaptive_lwlock_status();

-- A reason is given exactly where there is something to explain, and a source has slots.
SELECT source IN ('bpf', 'rseq', 'off') AS known_source,
       (source = 'bpf') = (source_reason IS NULL) AS explained,
       (source = 'off') = (slots_total = 0) AS has_slots,
       slots_used BETWEEN 0 AND slots_total AS in_bounds
FROM adaptive_lwlock_status();
