\set sensor random(0, 999)
SELECT sum(value) FROM readings WHERE sensor = :sensor;
