-- Branches, tellers and accounts, as in a bank: used by select_only and tpcb. Many branches, so that row
-- locks on them do not hide the server's internal locks.
CREATE TABLE branches (id int PRIMARY KEY, balance bigint NOT NULL) WITH (fillfactor = 25);
CREATE TABLE tellers (id int PRIMARY KEY, branch int NOT NULL, balance bigint NOT NULL) WITH (fillfactor = 25);
CREATE TABLE accounts (id int PRIMARY KEY, branch int NOT NULL, balance bigint NOT NULL, filler char(60) NOT NULL)
    WITH (fillfactor = 80);
CREATE TABLE history (teller int, branch int, account int, delta int, at timestamptz);
INSERT INTO branches SELECT i, 0 FROM generate_series(1, 256) i;
INSERT INTO tellers SELECT i, (i - 1) / 10 + 1, 0 FROM generate_series(1, 2560) i;
INSERT INTO accounts SELECT i, i % 256 + 1, 0, '' FROM generate_series(1, 200000) i;
VACUUM (FREEZE, ANALYZE) branches, tellers, accounts;
