package cli

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"connectrpc.com/connect"

	"github.com/hearth-serverless/hearth/internal/stack"
)

func TestExitCodes(t *testing.T) {
	a := &app{}
	if err := a.root().PersistentFlags().Set("run", "/nowhere"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, ExitOK},
		{errors.New("x"), ExitFailed},
		{usagef("x"), ExitUsage},
		{fmt.Errorf("x: %w", stack.ErrDown), ExitDown},
		{a.explain(connect.NewError(connect.CodeUnavailable, errors.New("x")), "do"), ExitDown},
		{a.explain(connect.NewError(connect.CodeNotFound, errors.New("x")), "do"), ExitClientError},
		{a.explain(connect.NewError(connect.CodeInternal, errors.New("x")), "do"), ExitFailed},
		{a.explain(connect.NewError(connect.CodeCanceled, errors.New("x")), "do"), ExitInterrupted},
		{&httpError{code: 404}, ExitClientError},
		{&httpError{code: 503}, ExitServerError},
		{fmt.Errorf("x: %w", context.Canceled), ExitInterrupted},
	} {
		if got := exitCode(c.err); got != c.want {
			t.Errorf("%v: exit code %d, want %d", c.err, got, c.want)
		}
	}
}

func TestQuantities(t *testing.T) {
	for text, want := range map[string]int64{"": 0, "1": 1, "512Mi": 512 << 20, "2G": 2e9, "3k": 3000, "x": -1, "0": -1, "-1Mi": -1, "9999999999Gi": -1} {
		got, err := parseBytes(text)
		if err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("%q: %d bytes (%v), want %d", text, got, err, want)
		}
	}
	for text, want := range map[string]int64{"": 0, "0.5": 500, "2": 2000, "250m": 250, "m": -1, "NaN": -1, "0": -1, "1e300": -1} {
		got, err := parseCores(text)
		if err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("%q: %d thousandths (%v), want %d", text, got, err, want)
		}
	}
}

func TestAdvice(t *testing.T) {
	for _, c := range []struct{ reason, next, want string }{
		{"it is gone\n", "; see `hearth list`", "do: it is gone; see `hearth list`"},
		{"it fails:\r\nTraceback:\n  line 1\r\n", "; see `hearth logs`", "do: it fails:\n  Traceback:\n    line 1\nsee `hearth logs`"},
	} {
		if got := advise("do", c.reason, c.next); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
	if got := printable("a\x1b[31m\tb\x00\xff\u202e\nü\n"); got != "a\ufffd[31m\tb\ufffd\ufffd\ufffd\nü" {
		t.Errorf("prints %q", got)
	}
}
