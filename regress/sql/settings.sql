-- Names, defaults, ranges, units, who may set them and when.
SELECT name, setting, unit, vartype, context, min_val, max_val, enumvals
FROM pg_settings WHERE name LIKE 'adaptive\_lwlock.%' AND name <> 'adaptive_lwlock.max_spin' ORDER BY name;
SELECT vartype, unit, context, setting::int BETWEEN min_val::int AND max_val::int AS in_range
FROM pg_settings WHERE name = 'adaptive_lwlock.max_spin';
SELECT count(*) FROM pg_settings WHERE name LIKE 'adaptive\_lwlock.%' AND short_desc <> '' AND extra_desc <> '';

-- Every mode, and what is not one.
SET adaptive_lwlock.mode = park;
SELECT mode FROM adaptive_lwlock_status();
SET adaptive_lwlock.mode = 'BLIND';
SELECT mode FROM adaptive_lwlock_status();
SET adaptive_lwlock.mode = owner;
SELECT mode FROM adaptive_lwlock_status();
SET adaptive_lwlock.mode = 'spin';
SET adaptive_lwlock.mode = '';
SET adaptive_lwlock.mode = NULL;
SET adaptive_lwlock.mode = 1;
SELECT mode FROM adaptive_lwlock_status();

-- The transaction decides, as for every setting.
BEGIN;
SET LOCAL adaptive_lwlock.mode = park;
SELECT mode FROM adaptive_lwlock_status();
ROLLBACK;
SELECT mode FROM adaptive_lwlock_status();

-- The budget is a plain number of microseconds: the server has no settings in that unit, and takes no unit here.
SET adaptive_lwlock.max_spin = 0;
SHOW adaptive_lwlock.max_spin;
SET adaptive_lwlock.max_spin = '50';
SHOW adaptive_lwlock.max_spin;
SET adaptive_lwlock.max_spin = '50us';
SET adaptive_lwlock.max_spin = -1;
SET adaptive_lwlock.max_spin = '10 min';
SET adaptive_lwlock.max_spin = 2147483648;
SET adaptive_lwlock.max_spin = 'long';
SET adaptive_lwlock.max_spin = '1kB';
SHOW adaptive_lwlock.max_spin;
RESET adaptive_lwlock.max_spin;

-- The source is chosen at server start.
SET adaptive_lwlock.sched_state = rseq;
ALTER SYSTEM SET adaptive_lwlock.sched_state = 'magic';

-- Nothing else hides behind the prefix.
SET adaptive_lwlock.no_such_setting = 1;

-- Only a superuser may change how a backend waits.
CREATE ROLE regress_adaptive_user;
SET ROLE regress_adaptive_user;
SET adaptive_lwlock.mode = park;
SET adaptive_lwlock.max_spin = 10;
SHOW adaptive_lwlock.mode;
RESET ROLE;
DROP ROLE regress_adaptive_user;
