// The hearth command: functions that start at once, on this machine. See package internal/cli.
package main

import (
	"os"

	"github.com/hearth-serverless/hearth/internal/cli"
)

func main() {
	os.Exit(cli.Main())
}
