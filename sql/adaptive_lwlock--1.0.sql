\echo Use "CREATE EXTENSION adaptive_lwlock" to load this file. \quit

CREATE FUNCTION adaptive_lwlock_status(
    OUT active boolean,
    OUT reason text,
    OUT source text,
    OUT source_reason text,
    OUT mode text,
    OUT server_version text,
    OUT functions_replaced integer,
    OUT slots_used integer,
    OUT slots_total integer)
RETURNS record
AS 'MODULE_PATHNAME'
LANGUAGE C STRICT VOLATILE PARALLEL RESTRICTED;

CREATE FUNCTION pg_stat_adaptive_lwlock(
    OUT tranche text,
    OUT contended bigint,
    OUT spin_acquired bigint,
    OUT owner_off_cpu bigint,
    OUT budget_spent bigint,
    OUT sleeps bigint,
    OUT wakeups_sent bigint,
    OUT wakeups_spared bigint,
    OUT spin_time double precision)
RETURNS SETOF record
AS 'MODULE_PATHNAME'
LANGUAGE C STRICT VOLATILE PARALLEL SAFE;

CREATE FUNCTION pg_stat_adaptive_lwlock_reset()
RETURNS void
AS 'MODULE_PATHNAME'
LANGUAGE C STRICT VOLATILE PARALLEL SAFE;

CREATE FUNCTION adaptive_lwlock_backends(
    OUT pid integer,
    OUT slot integer,
    OUT state text,
    OUT cpu integer,
    OUT switches bigint)
RETURNS SETOF record
AS 'MODULE_PATHNAME'
LANGUAGE C STRICT VOLATILE PARALLEL RESTRICTED;

CREATE VIEW pg_stat_adaptive_lwlock AS SELECT * FROM pg_stat_adaptive_lwlock();
CREATE VIEW adaptive_lwlock_backends AS SELECT * FROM adaptive_lwlock_backends();

REVOKE ALL ON FUNCTION adaptive_lwlock_status() FROM PUBLIC;
REVOKE ALL ON FUNCTION pg_stat_adaptive_lwlock() FROM PUBLIC;
REVOKE ALL ON FUNCTION pg_stat_adaptive_lwlock_reset() FROM PUBLIC;
REVOKE ALL ON FUNCTION adaptive_lwlock_backends() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION adaptive_lwlock_status() TO pg_monitor;
GRANT EXECUTE ON FUNCTION pg_stat_adaptive_lwlock() TO pg_monitor;
GRANT EXECUTE ON FUNCTION adaptive_lwlock_backends() TO pg_monitor;
GRANT SELECT ON pg_stat_adaptive_lwlock TO pg_monitor;
GRANT SELECT ON adaptive_lwlock_backends TO pg_monitor;
