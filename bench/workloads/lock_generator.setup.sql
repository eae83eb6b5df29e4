CREATE EXTENSION lock_generator;
