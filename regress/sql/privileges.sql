CREATE ROLE regress_adaptive_user;
CREATE ROLE regress_adaptive_monitor;
GRANT pg_monitor TO regress_adaptive_monitor;

-- Anybody: nothing.
SET ROLE regress_adaptive_user;
SELECT count(*) FROM adaptive_lwlock_status();
SELECT count(*) FROM pg_stat_adaptive_lwlock;
SELECT count(*) FROM adaptive_lwlock_backends;
SELECT count(*) FROM pg_stat_adaptive_lwlock();
SELECT count(*) FROM adaptive_lwlock_backends();
SELECT pg_stat_adaptive_lwlock_reset();

-- pg_monitor: everything but the reset.
SET ROLE regress_adaptive_monitor;
SELECT count(*) FROM adaptive_lwlock_status();
SELECT count(*) >= 0 AS readable FROM pg_stat_adaptive_lwlock;
SELECT count(*) > 0 AS readable FROM adaptive_lwlock_backends;
SELECT pg_stat_adaptive_lwlock_reset();
DELETE FROM pg_stat_adaptive_lwlock;

-- A superuser can hand out the reset.
RESET ROLE;
GRANT EXECUTE ON FUNCTION pg_stat_adaptive_lwlock_reset() TO regress_adaptive_monitor;
SET ROLE regress_adaptive_monitor;
SELECT pg_stat_adaptive_lwlock_reset();
RESET ROLE;

REVOKE EXECUTE ON FUNCTION pg_stat_adaptive_lwlock_reset() FROM regress_adaptive_monitor;
DROP ROLE regress_adaptive_user, regress_adaptive_monitor;
