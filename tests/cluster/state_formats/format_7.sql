BEGIN;
-- Several may find an older one at once.
SELECT pg_advisory_xact_lock(1635083374);
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
INSERT INTO meta (format, token) SELECT 6, 0 WHERE NOT EXISTS (SELECT 1 FROM meta);
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
-- Of format 2, which knew no promotion.
ALTER TABLE cluster
    ADD COLUMN IF NOT EXISTS coming_back boolean NOT NULL DEFAULT false,
    ADD COLUMN IF NOT EXISTS fence_begun boolean NOT NULL DEFAULT false;
ALTER TABLE copied ADD COLUMN IF NOT EXISTS peer_cluster text NOT NULL DEFAULT '';
ALTER TABLE transition
    ADD COLUMN IF NOT EXISTS epoch bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS asked text NOT NULL DEFAULT '',
    ADD COLUMN IF NOT EXISTS undone text;
CREATE TABLE IF NOT EXISTS promotion (
    epoch bigint PRIMARY KEY,
    kind text NOT NULL,
    time timestamptz NOT NULL DEFAULT now(),
    lsn text NOT NULL,
    commit_time timestamptz,
    system_id text NOT NULL,
    timeline int NOT NULL,
    peer_cluster text NOT NULL,
    slot text NOT NULL,
    publication text NOT NULL,
    peer_fenced boolean NOT NULL,
    settled boolean NOT NULL);
CREATE TABLE IF NOT EXISTS fence (
    epoch bigint NOT NULL,
    by_cluster text NOT NULL,
    since timestamptz NOT NULL DEFAULT now(),
    settled boolean NOT NULL,
    lifted boolean NOT NULL);
CREATE TABLE IF NOT EXISTS divergence (
    epoch bigint PRIMARY KEY,
    found timestamptz NOT NULL DEFAULT now(),
    exact boolean NOT NULL,
    reason text NOT NULL,
    from_lsn text NOT NULL,
    to_lsn text NOT NULL,
    transactions bigint NOT NULL);
CREATE TABLE IF NOT EXISTS diverged_row (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    epoch bigint NOT NULL,
    table_name text NOT NULL,
    change text NOT NULL,
    old jsonb,
    new jsonb);
CREATE TABLE IF NOT EXISTS diverged_package (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    epoch bigint NOT NULL,
    ident text NOT NULL,
    target text NOT NULL,
    checksum text NOT NULL,
    class text NOT NULL,
    key text NOT NULL,
    their_checksum text);
CREATE TABLE IF NOT EXISTS drill (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    time timestamptz NOT NULL DEFAULT now(),
    ok boolean NOT NULL,
    text text NOT NULL,
    write_seconds float8,
    answer_seconds float8);
-- Of format 3, which knew epochs as numbers only.
CREATE TABLE IF NOT EXISTS lineage (
    id text PRIMARY KEY,
    epoch bigint NOT NULL,
    parent text NOT NULL,
    cluster text NOT NULL,
    system_id text NOT NULL,
    since timestamptz NOT NULL DEFAULT now());
INSERT INTO lineage (id, epoch, parent, cluster, system_id)
    SELECT 'root-' || s.system_identifier, greatest(c.epoch, 1), '', c.id, s.system_identifier::text
    FROM cluster c, pg_control_system() s WHERE c.role = 'primary' AND NOT EXISTS (SELECT 1 FROM lineage);
ALTER TABLE cluster ADD COLUMN IF NOT EXISTS approved text NOT NULL DEFAULT '';
-- Where everybody may make functions, one of them could take the place of the server's own.
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
CREATE TABLE IF NOT EXISTS compared (
    table_name text PRIMARY KEY,
    file bigint NOT NULL,
    time timestamptz NOT NULL DEFAULT now());
ALTER TABLE generation ADD COLUMN IF NOT EXISTS unproven boolean NOT NULL DEFAULT false;
CREATE TABLE IF NOT EXISTS absent (
    key text PRIMARY KEY,
    ident text NOT NULL,
    target text NOT NULL,
    since timestamptz NOT NULL DEFAULT now());
GRANT SELECT ON cluster, copied, confirmation, fence, promotion, lineage, meta TO PUBLIC;
-- Of format 4, which counted deletions without their names.
ALTER TABLE vanished
    ADD COLUMN IF NOT EXISTS package_names text[] NOT NULL DEFAULT '{}',
    ADD COLUMN IF NOT EXISTS artifact_keys text[] NOT NULL DEFAULT '{}';
-- Of format 5, which recorded no place of the artifacts.
CREATE TABLE IF NOT EXISTS artifact_place (
    mode text NOT NULL,
    endpoint text NOT NULL,
    bucket text NOT NULL,
    proved boolean NOT NULL);
-- Of format 6, which had no leases.
CREATE TABLE IF NOT EXISTS lease (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    series text NOT NULL,
    number bigint NOT NULL,
    epoch bigint NOT NULL,
    holder text NOT NULL,
    nonce text NOT NULL,
    fenced_for bigint,
    promised_ms bigint,
    touched boolean NOT NULL DEFAULT false);
UPDATE meta SET format = 7 WHERE format < 7;
COMMIT;
