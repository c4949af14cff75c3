-- Format 3: promotions, fences, divergence and drills.
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
