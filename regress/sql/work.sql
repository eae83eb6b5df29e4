-- Ordinary work gives ordinary results in every mode: one session, every kind of lock on the way.
CREATE TABLE work (id bigserial PRIMARY KEY, v int, pad text DEFAULT repeat('x', 100));
CREATE INDEX work_v ON work USING hash (v);
CREATE INDEX work_pad ON work USING gin (to_tsvector('simple', pad));
CREATE FUNCTION do_work(n int) RETURNS TABLE (rows bigint, total bigint) LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO work (v) SELECT i FROM generate_series(1, n) i;
    FOR i IN 1..20 LOOP
        BEGIN
            UPDATE work SET v = v + 1 WHERE work.id % 10 = i % 10;
            IF i % 5 = 0 THEN RAISE EXCEPTION 'undone'; END IF;
        EXCEPTION WHEN raise_exception THEN NULL;
        END;
    END LOOP;
    RETURN QUERY SELECT count(*), sum(v) FROM work;
    DELETE FROM work;
END $$;
SET adaptive_lwlock.mode = owner;
SELECT * FROM do_work(1000);
SET adaptive_lwlock.mode = blind;
SELECT * FROM do_work(1000);
SET adaptive_lwlock.mode = park;
SELECT * FROM do_work(1000);
RESET adaptive_lwlock.mode;
-- No budget: mode owner without a step of spinning.
SET adaptive_lwlock.max_spin = 0;
SELECT * FROM do_work(1000);
RESET adaptive_lwlock.max_spin;
VACUUM ANALYZE work;
REINDEX TABLE work;
DROP FUNCTION do_work(int);
DROP TABLE work;
