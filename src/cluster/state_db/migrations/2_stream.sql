-- Format 2: the stream. A change carries the LSN of its commit.
ALTER TABLE replacement ADD COLUMN IF NOT EXISTS lsn text NOT NULL DEFAULT '';
ALTER TABLE vanished ADD COLUMN IF NOT EXISTS lsn text NOT NULL DEFAULT '';
ALTER TABLE copied ADD COLUMN IF NOT EXISTS schema text NOT NULL DEFAULT '';
ALTER TABLE copied ADD COLUMN IF NOT EXISTS slot text NOT NULL DEFAULT '';
CREATE TABLE IF NOT EXISTS retirement (
    key text NOT NULL,
    checksum text NOT NULL,
    since timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (key, checksum));
