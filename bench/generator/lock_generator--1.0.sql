\echo Use "CREATE EXTENSION lock_generator" to load this file. \quit

-- Takes the lock min_ms / (hold_ns + out_ns) times, rounded up, with hold_ns of work inside and out_ns
-- outside. shared_pct of the acquires are shared. One acquire in sleep_every (0: none) also sleeps sleep_us
-- inside the lock, one in compute_every (0: none) also computes compute_us inside it. Returns the number of
-- acquires.
CREATE FUNCTION lock_generator_run(hold_ns int, out_ns int, min_ms float8 DEFAULT 2, shared_pct int DEFAULT 0,
                                   sleep_every int DEFAULT 0, sleep_us int DEFAULT 0,
                                   compute_every int DEFAULT 0, compute_us int DEFAULT 0)
RETURNS bigint LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME';

-- Milliseconds of the longest acquire by a query of lock_generator_run() that has ended since this was last
-- called. Where a turn takes less than 1000 ns one acquire in 16 is timed.
CREATE FUNCTION lock_generator_longest_wait()
RETURNS float8 LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME';

-- Nanoseconds that one turn of the busy loop takes on this machine.
CREATE FUNCTION lock_generator_calibrate()
RETURNS float8 LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME';

-- Nanoseconds that moving a written cache line from one CPU to another takes (0 with a single CPU).
CREATE FUNCTION lock_generator_line_cost()
RETURNS float8 LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME';

-- Takes the lock so often, shared_pct of them shared, and raises an error when two holders were in it that
-- exclude each other.
CREATE FUNCTION lock_generator_stress(acquires bigint, shared_pct int)
RETURNS bigint LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME';

-- What all finished stress calls add up to. `value` was counted under the lock without atomics, `exclusive`
-- per call.
CREATE FUNCTION lock_generator_stress_totals(OUT exclusive bigint, OUT shared bigint, OUT value bigint)
RETURNS record LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME';

-- Raises an error while it holds both locks, one exclusively and one shared.
CREATE FUNCTION lock_generator_error()
RETURNS void LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME';

-- Starts a background worker that takes the lock of lock_generator_run() once, and whose SIGTERM handler is the default:
-- it exits at once, also while it waits. Returns its process id.
CREATE FUNCTION lock_generator_start_waiter()
RETURNS int LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME';

-- Takes and checks the locks of the torture for so long, together with every other session that does
-- (torture.h).
CREATE FUNCTION lock_generator_torture(milliseconds int, seed bigint)
RETURNS void LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME';

-- For so long, stops processes of this server at random (SIGSTOP), one at a time and up to 16 ms each.
CREATE FUNCTION lock_generator_torture_stops(milliseconds int, seed bigint)
RETURNS void LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME';

-- What the torture has done since the server's shared memory was made (`started` tells one from the next), the
-- longest waits in milliseconds, and the first violation.
CREATE FUNCTION lock_generator_torture_totals(
    OUT started bigint, OUT epoch bigint, OUT acquires bigint, OUT tasks int, OUT stops bigint, OUT stopped_ms float8,
    OUT exclusive_ms float8, OUT shared_ms float8, OUT until_free_ms float8, OUT variable_ms float8,
    OUT violations int, OUT violation text)
RETURNS record LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME';

-- The torture's locks (0 and above), and of the server's fixed ones (negative) those with waiters, read
-- without any lock. holds: how often it was taken, of the torture's; waiters: pid/mode/state of each.
CREATE FUNCTION lock_generator_torture_locks(
    OUT lock int, OUT name text, OUT state bigint, OUT held boolean, OUT holds bigint, OUT waiters text)
RETURNS SETOF record LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME';

REVOKE ALL ON FUNCTION lock_generator_run(int, int, float8, int, int, int, int, int), lock_generator_longest_wait(),
    lock_generator_calibrate(),
    lock_generator_line_cost(), lock_generator_stress(bigint, int), lock_generator_stress_totals(),
    lock_generator_error(), lock_generator_start_waiter(), lock_generator_torture(int, bigint),
    lock_generator_torture_stops(int, bigint),
    lock_generator_torture_totals(), lock_generator_torture_locks() FROM PUBLIC;
