BEGIN;
CREATE TABLE IF NOT EXISTS meta (
    format int NOT NULL,
    token bigint NOT NULL);
CREATE TABLE IF NOT EXISTS cluster (
    id text NOT NULL,
    role text,
    epoch bigint NOT NULL,
    since timestamptz NOT NULL);
CREATE TABLE IF NOT EXISTS artifact (
    key text PRIMARY KEY,
    checksum text NOT NULL,
    bytes bigint NOT NULL,
    etag text NOT NULL,
    state text NOT NULL,
    verified_at timestamptz NOT NULL);
CREATE TABLE IF NOT EXISTS event (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    time timestamptz NOT NULL DEFAULT now(),
    kind text NOT NULL,
    text text NOT NULL,
    change text NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS transition (
    kind text NOT NULL,
    step text NOT NULL,
    started timestamptz NOT NULL DEFAULT now());
CREATE TABLE IF NOT EXISTS copied (
    lsn text NOT NULL,
    commit_time timestamptz NOT NULL,
    system_id text NOT NULL,
    timeline int NOT NULL,
    transactions text NOT NULL,
    server_started text NOT NULL,
    sequences text NOT NULL);
CREATE TABLE IF NOT EXISTS content (
    table_name text PRIMARY KEY,
    rows bigint NOT NULL,
    hash text NOT NULL);
CREATE TABLE IF NOT EXISTS generation (
    name text PRIMARY KEY,
    created timestamptz NOT NULL DEFAULT now(),
    pinned boolean NOT NULL DEFAULT false);
CREATE TABLE IF NOT EXISTS replacement (
    key text PRIMARY KEY,
    old_checksum text NOT NULL,
    new_checksum text NOT NULL);
CREATE TABLE IF NOT EXISTS vanished (
    time timestamptz NOT NULL DEFAULT now(),
    packages bigint NOT NULL,
    artifacts bigint NOT NULL);
CREATE TABLE IF NOT EXISTS confirmation (
    time timestamptz NOT NULL,
    clock_offset float8 NOT NULL);
CREATE TABLE IF NOT EXISTS verification (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    time timestamptz NOT NULL,
    deep boolean NOT NULL,
    differences bigint NOT NULL,
    lsn text NOT NULL);
INSERT INTO cluster (id, epoch, since)
    SELECT substr(md5(random()::text || clock_timestamp()::text), 1, 8), 0, now()
    WHERE NOT EXISTS (SELECT 1 FROM cluster);
INSERT INTO meta (format, token) SELECT 2, 0 WHERE NOT EXISTS (SELECT 1 FROM meta);
-- Of format 1, which knew no stream.
ALTER TABLE replacement ADD COLUMN IF NOT EXISTS lsn text NOT NULL DEFAULT '';
ALTER TABLE vanished ADD COLUMN IF NOT EXISTS lsn text NOT NULL DEFAULT '';
ALTER TABLE copied ADD COLUMN IF NOT EXISTS schema text NOT NULL DEFAULT '';
ALTER TABLE copied ADD COLUMN IF NOT EXISTS slot text NOT NULL DEFAULT '';
CREATE TABLE IF NOT EXISTS retirement (
    key text NOT NULL,
    checksum text NOT NULL,
    since timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (key, checksum));
UPDATE meta SET format = 2 WHERE format < 2;
COMMIT;
