\echo Use "ALTER EXTENSION adaptive_lwlock UPDATE TO '1.1'" to load this file. \quit

CREATE FUNCTION pg_stat_adaptive_lwlock_reset_time()
RETURNS timestamp with time zone
AS 'MODULE_PATHNAME'
LANGUAGE C STRICT VOLATILE PARALLEL SAFE;

-- Replaced, not dropped: views of others may depend on it.
CREATE OR REPLACE VIEW pg_stat_adaptive_lwlock AS
SELECT s.*, pg_stat_adaptive_lwlock_reset_time() AS stats_reset FROM pg_stat_adaptive_lwlock() AS s;

REVOKE ALL ON FUNCTION pg_stat_adaptive_lwlock_reset_time() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION pg_stat_adaptive_lwlock_reset_time() TO pg_monitor, pg_read_all_stats;
GRANT EXECUTE ON FUNCTION adaptive_lwlock_status(), pg_stat_adaptive_lwlock(), adaptive_lwlock_backends() TO pg_read_all_stats;
GRANT SELECT ON pg_stat_adaptive_lwlock, adaptive_lwlock_backends TO pg_read_all_stats;
