-- Errors by their code: 42501 is "insufficient privilege".
\set VERBOSITY sqlstate
CREATE ROLE regress_adaptive_user;
CREATE ROLE regress_adaptive_monitor;
CREATE ROLE regress_adaptive_stats;
GRANT pg_monitor TO regress_adaptive_monitor;
GRANT pg_read_all_stats TO regress_adaptive_stats;

-- Anybody: nothing.
SET ROLE regress_adaptive_user;
SELECT count(*) FROM adaptive_lwlock_status();
SELECT count(*) FROM pg_stat_adaptive_lwlock;
SELECT count(*) FROM adaptive_lwlock_backends;
SELECT count(*) FROM pg_stat_adaptive_lwlock();
SELECT count(*) FROM adaptive_lwlock_backends();
SELECT pg_stat_adaptive_lwlock_reset();
SELECT pg_stat_adaptive_lwlock_reset_time();

-- Who reads all statistics, pg_monitor among them: everything but the reset.
SET ROLE regress_adaptive_stats;
SELECT count(*) FROM adaptive_lwlock_status();
SELECT count(*) >= 0 AS readable, min(stats_reset) <= now() IS NOT FALSE AS since FROM pg_stat_adaptive_lwlock;
SELECT count(*) > 0 AS readable FROM adaptive_lwlock_backends;
SELECT pg_stat_adaptive_lwlock_reset_time() <= now() AS since;
SELECT pg_stat_adaptive_lwlock_reset();
SET ROLE regress_adaptive_monitor;
SELECT count(*) FROM adaptive_lwlock_status();
SELECT count(*) >= 0 AS readable FROM pg_stat_adaptive_lwlock;
SELECT count(*) > 0 AS readable FROM adaptive_lwlock_backends;
SELECT pg_stat_adaptive_lwlock_reset();
DELETE FROM pg_stat_adaptive_lwlock;

-- Neither changes a setting, whichever way. One's own role and database are no way around it.
RESET ROLE;
CREATE DATABASE regression_adaptive_db TEMPLATE template0;
ALTER DATABASE regression_adaptive_db OWNER TO regress_adaptive_user;
SET ROLE regress_adaptive_monitor;
SET adaptive_lwlock.mode = park;
ALTER SYSTEM SET adaptive_lwlock.mode = park;
SET ROLE regress_adaptive_user;
SET adaptive_lwlock.mode = park;
SET SESSION adaptive_lwlock.mode = park;
SET LOCAL adaptive_lwlock.mode = park;
SELECT set_config('adaptive_lwlock.mode', 'park', false);
UPDATE pg_settings SET setting = 'park' WHERE name = 'adaptive_lwlock.mode';
RESET adaptive_lwlock.mode;
SET adaptive_lwlock.max_spin = 10;
ALTER SYSTEM SET adaptive_lwlock.mode = park;
ALTER SYSTEM SET adaptive_lwlock.max_spin = 10;
ALTER SYSTEM SET adaptive_lwlock.sched_state = off;
ALTER SYSTEM RESET adaptive_lwlock.mode;
ALTER ROLE regress_adaptive_user SET adaptive_lwlock.mode = park;
ALTER ROLE regress_adaptive_user SET adaptive_lwlock.max_spin = 10;
ALTER DATABASE regression_adaptive_db SET adaptive_lwlock.mode = park;
ALTER ROLE regress_adaptive_user IN DATABASE regression_adaptive_db SET adaptive_lwlock.max_spin = 10;
CREATE FUNCTION pg_temp.parked() RETURNS text LANGUAGE sql SET adaptive_lwlock.mode = park AS 'SELECT current_setting(''adaptive_lwlock.mode'')';
SHOW adaptive_lwlock.mode;
SELECT name, setting FROM pg_settings WHERE name LIKE 'adaptive\_lwlock.m%' ORDER BY name;
SELECT count(*) FROM pg_db_role_setting WHERE setconfig::text ~ 'adaptive';

-- A superuser can hand out the reset, and each way to change a setting by itself.
RESET ROLE;
GRANT EXECUTE ON FUNCTION pg_stat_adaptive_lwlock_reset() TO regress_adaptive_monitor;
GRANT SET ON PARAMETER adaptive_lwlock.mode TO regress_adaptive_user;
GRANT ALTER SYSTEM ON PARAMETER adaptive_lwlock.max_spin TO regress_adaptive_user;
SET ROLE regress_adaptive_monitor;
SELECT pg_stat_adaptive_lwlock_reset();
SET ROLE regress_adaptive_user;
SET adaptive_lwlock.mode = park;
SHOW adaptive_lwlock.mode;
RESET adaptive_lwlock.mode;
ALTER SYSTEM SET adaptive_lwlock.mode = park;
ALTER ROLE regress_adaptive_user SET adaptive_lwlock.mode = park;
ALTER ROLE regress_adaptive_user RESET adaptive_lwlock.mode;
ALTER SYSTEM SET adaptive_lwlock.max_spin = 200;
ALTER SYSTEM RESET adaptive_lwlock.max_spin;
SET adaptive_lwlock.max_spin = 10;
RESET ROLE;
REVOKE EXECUTE ON FUNCTION pg_stat_adaptive_lwlock_reset() FROM regress_adaptive_monitor;
REVOKE ALL ON PARAMETER adaptive_lwlock.mode, adaptive_lwlock.max_spin FROM regress_adaptive_user;
SET ROLE regress_adaptive_user;
SET adaptive_lwlock.mode = park;
RESET ROLE;

-- Nothing runs with its owner's rights, and no name is looked up in the caller's search_path.
SELECT count(*) FILTER (WHERE prosecdef) AS with_owners_rights, count(*) FILTER (WHERE has_function_privilege('public', p.oid, 'EXECUTE')) AS public
FROM pg_proc p JOIN pg_depend d ON d.objid = p.oid AND d.classid = 'pg_proc'::regclass AND d.deptype = 'e'
JOIN pg_extension e ON e.oid = d.refobjid AND d.refclassid = 'pg_extension'::regclass
WHERE extname = 'adaptive_lwlock';
CREATE SCHEMA regress_adaptive_trap AUTHORIZATION regress_adaptive_monitor;
SET ROLE regress_adaptive_monitor;
CREATE FUNCTION regress_adaptive_trap.adaptive_lwlock_backends(OUT pid int, OUT slot int, OUT state text, OUT cpu int, OUT switches bigint)
    RETURNS SETOF record LANGUAGE plpgsql AS $$ BEGIN RAISE 'trapped'; END $$;
CREATE FUNCTION regress_adaptive_trap.pg_stat_adaptive_lwlock() RETURNS SETOF int LANGUAGE plpgsql AS $$ BEGIN RAISE 'trapped'; END $$;
RESET ROLE;
SET search_path = regress_adaptive_trap, pg_catalog, public;
SELECT count(*) > 0 AS readable FROM public.adaptive_lwlock_backends;
SELECT count(*) >= 0 AS readable FROM public.pg_stat_adaptive_lwlock;
SELECT count(*) FROM public.adaptive_lwlock_status();
RESET search_path;

-- The view tells who runs where, and nothing of what anybody does there.
SELECT string_agg(attname, ', ' ORDER BY attnum) AS columns FROM pg_attribute
WHERE attrelid = 'adaptive_lwlock_backends'::regclass AND attnum > 0;

-- The owner of a database is not given the extension.
\set here :DBNAME
\c regression_adaptive_db
SET ROLE regress_adaptive_user;
CREATE EXTENSION adaptive_lwlock;
RESET ROLE;
\c :here
DROP DATABASE regression_adaptive_db;
DROP SCHEMA regress_adaptive_trap CASCADE;
DROP ROLE regress_adaptive_user, regress_adaptive_monitor, regress_adaptive_stats;
