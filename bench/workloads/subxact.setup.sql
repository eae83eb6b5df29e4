-- Each client updates its own rows in so many subtransactions that a snapshot cannot hold them all, and reads
-- rows of others: whose subtransaction was that, and is its parent still running?
CREATE TABLE tasks (client int, item int, done int NOT NULL, PRIMARY KEY (client, item)) WITH (fillfactor = 20);
INSERT INTO tasks SELECT c, i, 0 FROM generate_series(0, 255) c, generate_series(1, 80) i;
VACUUM (FREEZE, ANALYZE) tasks;

CREATE FUNCTION work_on_tasks(me int, other int) RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1 .. 80 LOOP
        BEGIN
            UPDATE tasks SET done = done + 1 WHERE client = me AND item = i;
        EXCEPTION WHEN division_by_zero THEN
            NULL;
        END;
    END LOOP;
    RETURN (SELECT sum(done) FROM tasks WHERE client = other);
END $$;
