-- Format 4: the line of descent. Before it, epochs were numbers only.
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
-- Everybody could create functions in this schema, and one of them could replace a function of the server.
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
