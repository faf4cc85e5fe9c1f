"""The book of what is out of a pool."""

from __future__ import annotations

from threading import Thread

from connlab.checks.answers import Place
from connlab.checks.borrowers import Book, Borrowed


def place(line: int) -> Place:
    return Place("act", line, "<a cell of no lab>")


def test_what_came_back_is_struck_out_and_the_rest_is_known_by_its_line() -> None:
    book, first, second = Book(), object(), object()
    book.lend(first, place(1))
    book.lend(second, place(2))
    book.take_back(first)
    assert [each.place for each in book.out()] == [place(2)]


def test_a_connection_that_was_lost_stays_lost_when_a_new_one_has_its_id() -> None:
    book, connection = Book(), object()
    book.lend(connection, place(1))  # lost; the object stands for two that follow each other at one address
    book.lend(connection, place(2))
    book.take_back(connection)
    assert [each.place for each in book.out()] == [place(1)]


def test_a_return_that_fails_is_none() -> None:
    book, connection = Book(), object()
    book.lend(connection, place(1))
    book.restore(connection, book.take_back(connection))
    assert len(book.out()) == 1
    assert book.take_back(object()) is None


def test_each_thread_borrows_for_the_function_that_it_runs() -> None:
    book = Book()

    def run(name: str) -> None:
        book.begin(name)
        book.lend(name, place(1))

    for name in ("order", "report"):
        thread = Thread(target=run, args=[name])
        thread.start()
        thread.join()
    assert sorted(each.by for each in book.out()) == ["order", "report"]
    book.clear()
    assert book.out() == []


def test_a_line_is_named_alone_where_it_is_the_functions_own() -> None:
    assert str(Borrowed("act", place(3))) == "in `act`, line 3"
    assert str(Borrowed("order", place(3))) == "by `order`, in `act`, line 3"
    assert str(Borrowed("order", None)) == "by `order`"
