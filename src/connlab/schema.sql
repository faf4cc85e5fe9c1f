-- The sample shop that every server starts with: 1,000 users, an account for each, 10,000 orders.
-- Runs as the superuser. The ordinary role that learners and applications use is "app".
create role app login;
create database shop owner app;
\connect shop
set role app;

create table users (
    id         bigint generated always as identity primary key,
    email      text not null unique,
    name       text not null,
    created_at timestamptz not null default now()
);

create table accounts (
    id      bigint generated always as identity primary key,
    user_id bigint not null references users,
    balance numeric(12, 2) not null default 0 check (balance >= 0)
);

create table orders (
    id        bigint generated always as identity primary key,
    user_id   bigint not null references users,
    amount    numeric(12, 2) not null,
    placed_at timestamptz not null default now()
);
create index on orders (user_id);

insert into users (email, name)
select format('user%s@example.com', n), format('User %s', n) from generate_series(1, 1000) n;

insert into accounts (user_id, balance)
select id, 1000 from users order by id;

insert into orders (user_id, amount)
select 1 + n % 1000, 5 + n % 95 from generate_series(1, 10000) n;
