package daemon_test

import (
	"testing"

	"github.com/spf13/pflag"

	"github.com/hearth-serverless/hearth/internal/daemon"
)

func TestBytes(t *testing.T) {
	for text, want := range map[string]int64{
		"100663296": 96 << 20, "96MiB": 96 << 20, "96mb": 96 << 20, "96M": 96 << 20, "1.5g": 3 << 29, "0": 0,
		"-1": -1, "": -1, "many": -1, "5 parsecs": -1, "99999999999999999999": -1, "1e30": -1,
	} {
		got := int64(-1)
		f := pflag.NewFlagSet("", pflag.ContinueOnError)
		daemon.BytesVar(f, &got, "budget", 128<<20, "")
		if usage := f.Lookup("budget").DefValue; usage != "128MiB" {
			t.Errorf("the default is shown as %s", usage)
		}
		err := f.Parse([]string{"--budget=" + text})
		if (err != nil) != (want < 0) || err == nil && got != want {
			t.Errorf("%q: got %d, %v, want %d", text, got, err, want)
		}
	}
}
