from adc_worker.cli.main import main

if __name__ == "__main__":
    main()
