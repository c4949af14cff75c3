-- A Builder database in our own words: its tables, keys, types, sequences, views, functions and triggers, as far as a
-- replicator can tell the difference. Written for these tests; not Builder's text.

CREATE EXTENSION intarray;

CREATE TYPE origin_package_visibility AS ENUM ('public', 'private', 'hidden');
CREATE TYPE origin_member_role AS ENUM ('readonly_member', 'member', 'maintainer', 'administrator', 'owner');
CREATE TYPE origin_operation AS ENUM ('origin_create', 'origin_delete', 'owner_transfer');
CREATE TYPE origin_package_operation AS ENUM ('promote', 'demote');
CREATE TYPE package_channel_operation AS ENUM ('promote', 'demote');
CREATE TYPE package_channel_trigger AS ENUM ('unknown', 'builder_ui', 'hab_client');
CREATE TYPE job_exec_state AS ENUM (
    'pending', 'waiting_on_dependency', 'ready', 'running', 'complete',
    'job_failed', 'dependency_failed', 'cancel_pending', 'cancel_complete');

CREATE SEQUENCE accounts_id_seq;
CREATE SEQUENCE account_tokens_id_seq;
CREATE SEQUENCE audit_origin_id_seq;
CREATE SEQUENCE job_graph_id_seq;
CREATE SEQUENCE license_keys_id_seq;
CREATE SEQUENCE origin_id_seq;
CREATE SEQUENCE origin_channel_id_seq;
CREATE SEQUENCE origin_integration_id_seq;
CREATE SEQUENCE origin_invitations_id_seq;
CREATE SEQUENCE origin_package_id_seq;
CREATE SEQUENCE origin_package_settings_id_seq;
CREATE SEQUENCE origin_private_encryption_key_id_seq;
CREATE SEQUENCE origin_project_id_seq;
CREATE SEQUENCE origin_project_integration_id_seq;
CREATE SEQUENCE origin_public_encryption_key_id_seq;
CREATE SEQUENCE origin_public_key_id_seq;
CREATE SEQUENCE origin_secret_key_id_seq;
CREATE SEQUENCE origin_secrets_id_seq;

-- Ids are made of time: milliseconds since August 2014, then ten bits of a sequence, then thirteen bits of nothing.
CREATE FUNCTION milliseconds_of_builder_v1() RETURNS int8 LANGUAGE sql VOLATILE AS
$$ SELECT floor(extract(epoch FROM clock_timestamp() - timestamptz '2014-08-28 22:49:51+00') * 1000)::int8 $$;

CREATE FUNCTION next_id_v1(counter regclass) RETURNS int8 LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN (public.milliseconds_of_builder_v1() << 23) | ((nextval(counter) % 1024) << 13);
END $$;

CREATE TABLE __diesel_schema_migrations (
    version varchar(50) PRIMARY KEY,
    run_on timestamp NOT NULL DEFAULT CURRENT_TIMESTAMP
);

CREATE TABLE accounts (
    id int8 PRIMARY KEY DEFAULT next_id_v1('accounts_id_seq'),
    name text UNIQUE,
    email text,
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now()
);

CREATE TABLE account_tokens (
    id int8 PRIMARY KEY DEFAULT next_id_v1('account_tokens_id_seq'),
    account_id int8 UNIQUE,
    token text UNIQUE,
    created_at timestamptz DEFAULT now()
);

CREATE TABLE license_keys (
    id int8 PRIMARY KEY DEFAULT next_id_v1('license_keys_id_seq'),
    account_id int8 NOT NULL UNIQUE REFERENCES accounts (id),
    license_key text NOT NULL,
    expiration_date date NOT NULL,
    created_at timestamptz DEFAULT now()
);

CREATE TABLE origins (
    name text PRIMARY KEY,
    owner_id int8 NOT NULL REFERENCES accounts (id),
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now(),
    default_package_visibility origin_package_visibility NOT NULL DEFAULT 'public',
    hidden bool NOT NULL DEFAULT false
);

-- No primary key: a unique constraint on a column that may be null is no replica identity.
CREATE TABLE origin_members (
    origin text REFERENCES origins (name),
    account_id int8 NOT NULL REFERENCES accounts (id),
    member_role origin_member_role NOT NULL DEFAULT 'maintainer',
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now(),
    UNIQUE (origin, account_id)
);

CREATE TABLE origin_channels (
    id int8 PRIMARY KEY DEFAULT next_id_v1('origin_channel_id_seq'),
    owner_id int8,
    name text,
    origin text REFERENCES origins (name),
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now(),
    UNIQUE (origin, name)
);

CREATE TABLE origin_packages (
    id int8 PRIMARY KEY DEFAULT next_id_v1('origin_package_id_seq'),
    owner_id int8,
    name text,
    ident text,
    ident_array text[],
    checksum text,
    manifest text,
    config text,
    target text,
    deps text[] NOT NULL DEFAULT '{}',
    tdeps text[] NOT NULL DEFAULT '{}',
    exposes int4[] NOT NULL DEFAULT '{}',
    scheduler_sync bool DEFAULT false,
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now(),
    visibility origin_package_visibility NOT NULL DEFAULT 'public',
    ident_vector tsvector,
    origin text REFERENCES origins (name),
    build_deps text[] NOT NULL DEFAULT '{}',
    build_tdeps text[] NOT NULL DEFAULT '{}',
    package_type text NOT NULL DEFAULT 'standard',
    hidden bool NOT NULL DEFAULT false,
    UNIQUE (ident, target)
);
CREATE INDEX origin_packages_ident_array_idx ON origin_packages USING gin (ident_array);
CREATE INDEX origin_packages_ident_vector_idx ON origin_packages USING gin (ident_vector);
CREATE INDEX origin_packages_tdeps_idx ON origin_packages USING gin (tdeps);
CREATE INDEX origin_packages_exposes_idx ON origin_packages USING gin (exposes gin__int_ops);
CREATE INDEX origin_packages_origin_idx ON origin_packages (origin, name);

CREATE TABLE origin_channel_packages (
    channel_id int8 REFERENCES origin_channels (id) ON DELETE CASCADE,
    package_id int8 REFERENCES origin_packages (id),
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now(),
    PRIMARY KEY (channel_id, package_id)
);

CREATE TABLE origin_package_settings (
    id int8 PRIMARY KEY DEFAULT next_id_v1('origin_package_settings_id_seq'),
    origin text NOT NULL REFERENCES origins (name),
    name text NOT NULL,
    visibility origin_package_visibility NOT NULL DEFAULT 'public',
    owner_id int8 NOT NULL REFERENCES accounts (id),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    hidden bool NOT NULL DEFAULT false,
    UNIQUE (origin, name)
);

CREATE TABLE origin_public_keys (
    id int8 PRIMARY KEY DEFAULT next_id_v1('origin_public_key_id_seq'),
    owner_id int8,
    name text,
    revision text,
    full_name text UNIQUE,
    body text,
    origin text REFERENCES origins (name),
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now()
);

CREATE TABLE origin_secret_keys (
    id int8 PRIMARY KEY DEFAULT next_id_v1('origin_secret_key_id_seq'),
    owner_id int8,
    name text,
    revision text,
    full_name text UNIQUE,
    body text,
    origin text REFERENCES origins (name),
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now(),
    encryption_key_rev text
);

CREATE TABLE origin_public_encryption_keys (
    id int8 PRIMARY KEY DEFAULT next_id_v1('origin_public_encryption_key_id_seq'),
    owner_id int8,
    name text,
    revision text,
    full_name text UNIQUE,
    body text,
    origin text REFERENCES origins (name),
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now()
);

CREATE TABLE origin_private_encryption_keys (
    id int8 PRIMARY KEY DEFAULT next_id_v1('origin_private_encryption_key_id_seq'),
    owner_id int8,
    name text,
    revision text,
    full_name text UNIQUE,
    body text,
    origin text REFERENCES origins (name),
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now()
);

CREATE TABLE origin_secrets (
    id int8 PRIMARY KEY DEFAULT next_id_v1('origin_secrets_id_seq'),
    owner_id int8,
    name text,
    value text,
    origin text REFERENCES origins (name),
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now(),
    UNIQUE (origin, name)
);

CREATE TABLE origin_integrations (
    id int8 PRIMARY KEY DEFAULT next_id_v1('origin_integration_id_seq'),
    origin text REFERENCES origins (name),
    integration text,
    name text,
    body text,
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now(),
    UNIQUE (origin, integration, name)
);

CREATE TABLE origin_invitations (
    id int8 PRIMARY KEY DEFAULT next_id_v1('origin_invitations_id_seq'),
    origin text REFERENCES origins (name),
    account_id int8 REFERENCES accounts (id),
    account_name text,
    owner_id int8,
    ignored bool DEFAULT false,
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now(),
    UNIQUE (origin, account_id)
);

CREATE TABLE origin_projects (
    id int8 PRIMARY KEY DEFAULT next_id_v1('origin_project_id_seq'),
    owner_id int8,
    origin text REFERENCES origins (name),
    package_name text,
    name text,
    plan_path text,
    target text NOT NULL DEFAULT 'x86_64-linux',
    vcs_type text,
    vcs_data text,
    vcs_installation_id int8,
    auto_build bool NOT NULL DEFAULT true,
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now(),
    UNIQUE (origin, package_name, name, target)
);

CREATE TABLE origin_project_integrations (
    id int8 PRIMARY KEY DEFAULT next_id_v1('origin_project_integration_id_seq'),
    origin text NOT NULL REFERENCES origins (name),
    body text NOT NULL,
    project_id int8 NOT NULL REFERENCES origin_projects (id) ON DELETE CASCADE,
    integration_id int8 NOT NULL REFERENCES origin_integrations (id) ON DELETE CASCADE,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (project_id, integration_id)
);

CREATE TABLE audit_origin (
    id int8 PRIMARY KEY DEFAULT next_id_v1('audit_origin_id_seq'),
    operation origin_operation,
    target_object text,
    origin text,
    requester_id int8,
    requester_name text,
    created_at timestamptz DEFAULT now()
);

-- No key at all: two equal rows may stand in it.
CREATE TABLE audit_package (
    operation package_channel_operation,
    trigger package_channel_trigger,
    requester_id int8,
    requester_name text,
    created_at timestamptz DEFAULT now(),
    origin text,
    channel text,
    package_ident text
);

CREATE TABLE audit_package_group (
    package_ids int8[],
    operation origin_package_operation,
    trigger package_channel_trigger,
    requester_id int8,
    requester_name text,
    created_at timestamptz DEFAULT now(),
    group_id int8,
    origin text,
    channel text
);

CREATE TABLE job_graph (
    id int8 PRIMARY KEY DEFAULT nextval('job_graph_id_seq'),
    group_id int8 NOT NULL,
    project_name text,
    job_id int8,
    job_state job_exec_state,
    manifest_ident text,
    as_built_ident text,
    dependencies int8[] NOT NULL,
    waiting_on_count int4 NOT NULL,
    target_platform text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX job_graph_dependencies_idx ON job_graph USING gin (dependencies);
CREATE INDEX job_graph_state_idx ON job_graph (job_state);

-- Triggers.

CREATE FUNCTION update_origin_package_vector_index() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.ident_vector := to_tsvector('pg_catalog.simple', translate(NEW.ident, '/', ' '));
    RETURN NEW;
END $$;
CREATE TRIGGER origin_packages_vector BEFORE INSERT ON origin_packages
    FOR EACH ROW EXECUTE FUNCTION update_origin_package_vector_index();

CREATE FUNCTION diesel_set_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW IS DISTINCT FROM OLD AND NEW.updated_at IS NOT DISTINCT FROM OLD.updated_at THEN
        NEW.updated_at := now();
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION diesel_manage_updated_at(which regclass) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('CREATE TRIGGER set_updated_at BEFORE UPDATE ON %s '
                   'FOR EACH ROW EXECUTE FUNCTION public.diesel_set_updated_at()', which);
END $$;
SELECT diesel_manage_updated_at('job_graph');

-- What the API and the scheduler call.

CREATE FUNCTION get_all_origin_packages_for_ident_v1(wanted text) RETURNS SETOF origin_packages LANGUAGE sql STABLE AS
$$ SELECT * FROM public.origin_packages WHERE starts_with(ident, wanted) ORDER BY ident $$;

CREATE FUNCTION get_origin_package_v5(wanted text, allowed origin_package_visibility[])
RETURNS SETOF origin_packages LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN QUERY SELECT * FROM public.origin_packages p WHERE p.ident = wanted AND p.visibility = ANY (allowed);
END $$;

CREATE FUNCTION origin_package_count_v1(of_origin text) RETURNS int8 LANGUAGE sql STABLE AS
$$ SELECT count(*) FROM public.origin_packages WHERE origin = of_origin $$;

CREATE FUNCTION exposed_ports_v1(of_package int8) RETURNS int4[] LANGUAGE sql STABLE AS
$$ SELECT public.uniq(public.sort(exposes)) FROM public.origin_packages WHERE id = of_package $$;

CREATE FUNCTION version_parts_v1(version text) RETURNS numeric[] LANGUAGE sql IMMUTABLE AS
$$ SELECT array(SELECT part[1]::numeric FROM regexp_matches(version, '[0-9]+', 'g') AS part) $$;

CREATE FUNCTION t_deps_for_id(job int8) RETURNS SETOF int8 LANGUAGE sql STABLE AS $$
    WITH RECURSIVE below (id) AS (
        SELECT unnest(dependencies) FROM public.job_graph WHERE id = job
        UNION
        SELECT unnest(g.dependencies) FROM public.job_graph g JOIN below b ON g.id = b.id)
    SELECT id FROM below $$;

CREATE FUNCTION t_deps_for_id_group(job int8, of_group int8) RETURNS SETOF int8 LANGUAGE sql STABLE AS $$
    SELECT d.id FROM public.t_deps_for_id(job) AS d (id)
    JOIN public.job_graph g ON g.id = d.id AND g.group_id = of_group $$;

CREATE FUNCTION t_rdeps_for_id(job int8) RETURNS SETOF int8 LANGUAGE sql STABLE AS $$
    WITH RECURSIVE above (id) AS (
        SELECT id FROM public.job_graph WHERE dependencies @> ARRAY[job]
        UNION
        SELECT g.id FROM public.job_graph g JOIN above a ON g.dependencies @> ARRAY[a.id])
    SELECT id FROM above $$;

CREATE FUNCTION job_graph_mark_complete(job int8, built text) RETURNS int4 LANGUAGE plpgsql AS $$
DECLARE
    freed int4;
BEGIN
    UPDATE public.job_graph SET job_state = 'complete', as_built_ident = built WHERE id = job;
    UPDATE public.job_graph
       SET waiting_on_count = waiting_on_count - 1,
           job_state = CASE WHEN waiting_on_count = 1 THEN 'ready' ELSE job_state END
     WHERE dependencies @> ARRAY[job] AND job_state = 'waiting_on_dependency';
    GET DIAGNOSTICS freed = ROW_COUNT;
    RETURN freed;
END $$;

CREATE FUNCTION job_graph_mark_failed(job int8) RETURNS int4 LANGUAGE plpgsql AS $$
DECLARE
    lost int4;
BEGIN
    UPDATE public.job_graph SET job_state = 'job_failed' WHERE id = job;
    UPDATE public.job_graph SET job_state = 'dependency_failed'
     WHERE id IN (SELECT public.t_rdeps_for_id(job));
    GET DIAGNOSTICS lost = ROW_COUNT;
    RETURN lost;
END $$;

-- Views.

CREATE VIEW job_graph_completed AS
    SELECT g.*, ARRAY(SELECT d.id FROM job_graph d WHERE d.id = ANY (g.dependencies) AND d.job_state = 'complete')
        AS complete
    FROM job_graph g;

CREATE VIEW origin_packages_with_version_array AS
    SELECT p.*, version_parts_v1(p.ident_array[3]) AS version_array FROM origin_packages p;

CREATE VIEW origin_package_versions AS
    SELECT origin, name, visibility, ident_array[3] AS version, count(*) AS release_count,
           max(ident_array[4]) AS latest, array_agg(DISTINCT target) AS platforms
    FROM origin_packages GROUP BY origin, name, visibility, ident_array[3];

CREATE VIEW origins_with_secret_key AS
    SELECT o.*, (SELECT max(k.full_name) FROM origin_secret_keys k WHERE k.origin = o.name) AS private_key_name
    FROM origins o;

CREATE VIEW origins_with_stats AS
    SELECT o.*, (SELECT count(DISTINCT p.name) FROM origin_packages p WHERE p.origin = o.name) AS package_count
    FROM origins o;

CREATE VIEW packages_with_channel_platform AS
    SELECT p.*, ARRAY(SELECT c.name FROM origin_channels c JOIN origin_channel_packages cp ON cp.channel_id = c.id
                      WHERE cp.package_id = p.id ORDER BY c.name) AS channels
    FROM origin_packages p;

-- The migrations Builder records as run.
INSERT INTO __diesel_schema_migrations (version) VALUES
    ('00000000000000'), ('20180824184520'), ('20180824193407'), ('20181009192420'), ('20181010198563'),
    ('20181019666111'), ('20181031233453'), ('20181101111111'), ('20181102111111'), ('20181106111111'),
    ('20181106222222'), ('20181106444444'), ('20181112111111'), ('20190321066600'), ('20190405002317'),
    ('20190419'), ('20190513223900'), ('20190516004032'), ('20190531198242'), ('20190617214130'),
    ('20190624198169'), ('20191016347289'), ('20191105011907'), ('20191205163232'), ('20200128174159'),
    ('20200203175437'), ('20200211810532'), ('20200212195406'), ('20200303000001'), ('20200326195026'),
    ('20200327193418'), ('20200422172800'), ('20200423220500'), ('20200804136423'), ('20200908193306'),
    ('20200908195315'), ('20201109000001'), ('20220809111449'), ('20250317131916'), ('20250317145419'),
    ('20250416111111'), ('20250424000001'), ('20250601111111');
