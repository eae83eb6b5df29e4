-- A batch of rows at the end of one table: all clients want the sequence, the last index leaf and the last
-- heap pages.
INSERT INTO events (source, payload) SELECT :client_id::int, 'something happened' FROM generate_series(1, 100);
