package waterfall_test

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/internal/waterfall"
)

var update = flag.Bool("update", false, "write the golden files again")

const ms = time.Millisecond

func TestGolden(t *testing.T) {
	cold := []waterfall.Phase{
		{Name: "process", Offset: 2000 * ms, Duration: 500 * ms},
		{Name: "resolve", Offset: 3 * ms, Duration: 12 * ms},
		{Name: "fetch", Offset: 15 * ms, Duration: 900 * ms, Busy: 300 * ms},
		{Name: "decompress", Offset: 20 * ms, Duration: 1500 * ms, Busy: 1400 * ms},
		{Name: "unpack", Offset: 25 * ms, Duration: 1800 * ms, Busy: 1200 * ms},
		{Name: "create", Offset: 1900 * ms, Duration: 80 * ms},
		{Name: "first_byte", Offset: 2500 * ms, Duration: 1200 * time.Microsecond},
	}
	for name, c := range map[string]waterfall.Chart{
		"cold":     {Title: "start of hello", Phases: cold},
		"ascii":    {Phases: cold, ASCII: true, Width: 30},
		"one":      {Phases: []waterfall.Phase{{Name: "claim", Duration: 70 * time.Microsecond}}},
		"nothing":  {Title: "start of hello"},
		"negative": {Phases: []waterfall.Phase{{Name: "odd", Offset: -5 * ms, Duration: -ms}, {Name: "long", Duration: 12 * time.Second}}},
		"zero":     {Phases: []waterfall.Phase{{Name: "claim"}}},
	} {
		t.Run(name, func(t *testing.T) {
			var b strings.Builder
			if err := c.Write(&b); err != nil {
				t.Fatal(err)
			}
			golden(t, name, b.String())
		})
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".txt")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
