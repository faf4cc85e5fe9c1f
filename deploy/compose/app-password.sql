-- After schema.sql: the role app gets its password, from the file; a statement that fails would be logged whole.
set log_min_error_statement = panic;
\set password `cat /run/connlab/app_password`
alter role app password :'password';
