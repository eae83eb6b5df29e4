TRUNCATE history;
VACUUM branches, tellers;
