module github.com/msb-project/msb/sdk/go

go 1.25
