-- More relations (32 partitions and an index on each) than a backend's fast-path lock slots: the rest go to
-- the shared lock table.
CREATE TABLE readings (sensor int NOT NULL, at int NOT NULL, value int NOT NULL) PARTITION BY HASH (at);
SELECT format('CREATE TABLE readings_%s PARTITION OF readings FOR VALUES WITH (MODULUS 32, REMAINDER %s)', i, i)
FROM generate_series(0, 31) i \gexec
INSERT INTO readings SELECT i % 1000, i / 1000, i FROM generate_series(0, 99999) i;
CREATE INDEX ON readings (sensor);
VACUUM (FREEZE, ANALYZE) readings;
