VACUUM tasks;
