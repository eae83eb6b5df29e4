-- Taking the extension out of a database takes its objects; locks go on being waited for in the module's way.
DROP EXTENSION adaptive_lwlock;
SELECT proname FROM pg_proc WHERE proname LIKE '%adaptive_lwlock%';
SHOW adaptive_lwlock.mode;

CREATE EXTENSION adaptive_lwlock VERSION '1.0';
SELECT extversion, extrelocatable FROM pg_extension WHERE extname = 'adaptive_lwlock';
CREATE EXTENSION adaptive_lwlock;

-- An older version works with this module, and what others made of its views survives the update.
SELECT count(*) >= 0 AS readable FROM pg_stat_adaptive_lwlock;
SELECT count(*) > 0 AS readable FROM adaptive_lwlock_backends;
CREATE VIEW of_others AS SELECT tranche, sleeps FROM pg_stat_adaptive_lwlock;
ALTER EXTENSION adaptive_lwlock UPDATE;
SELECT extversion FROM pg_extension WHERE extname = 'adaptive_lwlock';
SELECT count(*) >= 0 AS readable FROM of_others;
DROP VIEW of_others;

-- It moves between schemas.
CREATE SCHEMA elsewhere;
ALTER EXTENSION adaptive_lwlock SET SCHEMA elsewhere;
SELECT active FROM elsewhere.adaptive_lwlock_status();
SELECT count(*) > 0 AS readable FROM elsewhere.adaptive_lwlock_backends;
ALTER EXTENSION adaptive_lwlock SET SCHEMA public;
DROP SCHEMA elsewhere;

-- What belongs to it is not dropped on its own (row types of views are listed or not, depending on the version).
DROP VIEW pg_stat_adaptive_lwlock;
SELECT object FROM (
    SELECT pg_describe_object(classid, objid, 0) AS object
    FROM pg_depend WHERE refobjid = (SELECT oid FROM pg_extension WHERE extname = 'adaptive_lwlock') AND deptype = 'e') objects
WHERE object NOT LIKE 'type %'
ORDER BY object COLLATE "C";
