package cli_test

import (
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/hearth-serverless/hearth/internal/cli"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"hearth": func() { os.Exit(cli.Main()) }})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata/script", RequireExplicitExec: true, Setup: func(env *testscript.Env) error {
		env.Setenv("IMAGE", imageRegistry(t))
		return nil
	}})
}
