SELECT attrelid::regclass AS view, attname, atttypid::regtype
FROM pg_attribute
WHERE attrelid IN ('pg_stat_adaptive_lwlock'::regclass, 'adaptive_lwlock_backends'::regclass) AND attnum > 0
ORDER BY attrelid::regclass::text COLLATE "C", attnum;

-- The backends that the server knows are the backends shown, once each.
SELECT count(*) AS missing FROM pg_stat_activity a
WHERE NOT EXISTS (SELECT FROM adaptive_lwlock_backends b WHERE b.pid = a.pid)
  AND backend_type NOT IN ('autovacuum worker', 'parallel worker');
SELECT count(*) AS gone FROM adaptive_lwlock_backends b
WHERE NOT EXISTS (SELECT FROM pg_stat_activity a WHERE a.pid = b.pid);
SELECT count(*) AS twice FROM (SELECT pid FROM adaptive_lwlock_backends GROUP BY pid HAVING count(*) > 1) twice;
SELECT count(*) AS same_slot
FROM (SELECT slot FROM adaptive_lwlock_backends WHERE slot IS NOT NULL GROUP BY slot HAVING count(*) > 1) twice;

-- With a source, the backend that looks has a slot and sees itself running.
SELECT b.slot IS NOT NULL = (s.source <> 'off') AS has_slot,
       b.state = CASE s.source WHEN 'off' THEN 'unknown' ELSE 'on_cpu' END AS sees_itself
FROM adaptive_lwlock_backends b, adaptive_lwlock_status() s WHERE b.pid = pg_backend_pid();
SELECT count(*) AS unknown_state FROM adaptive_lwlock_backends
WHERE state NOT IN ('on_cpu', 'preempted', 'blocked', 'dead', 'unknown');

-- A tranche that was contended has a row; the counts fit together.
SELECT count(*) AS negative FROM pg_stat_adaptive_lwlock
WHERE least(contended, spin_acquired, owner_off_cpu, budget_spent, sleeps, wakeups_sent, wakeups_spared) < 0 OR spin_time < 0;
SELECT count(*) AS twice FROM (SELECT tranche FROM pg_stat_adaptive_lwlock GROUP BY tranche HAVING count(*) > 1) twice;
SELECT pg_stat_adaptive_lwlock_reset_time() AS time_before \gset
SELECT pg_stat_adaptive_lwlock_reset();
SELECT count(*) AS left_over FROM pg_stat_adaptive_lwlock WHERE contended > 1000;
SELECT reset_time > :'time_before' AND reset_time BETWEEN now() - interval '1 min' AND now() AS later
FROM pg_stat_adaptive_lwlock_reset_time() reset_time;
SELECT count(*) AS other_times FROM pg_stat_adaptive_lwlock WHERE stats_reset <> pg_stat_adaptive_lwlock_reset_time();
