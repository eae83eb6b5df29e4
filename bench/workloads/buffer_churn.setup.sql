-- Twice the shared buffers (bench/lib/cluster.py): every other page must be brought in and another one thrown
-- out. Four rows a page.
CREATE TABLE pages (id int PRIMARY KEY, filler text NOT NULL);
ALTER TABLE pages ALTER filler SET STORAGE PLAIN;
INSERT INTO pages SELECT i, repeat('x', 1900) FROM generate_series(1, 131072) i;
VACUUM (FREEZE, ANALYZE) pages;
